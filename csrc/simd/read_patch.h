// Reading one patch of a video (see video.h) into consecutive memory. Included once per instruction set, after simd.h.

namespace stmae::STMAE_ISA {

template <typename T>
static const T* patch_frame(const Patches& s, int64_t b, int64_t token, int64_t iu) {  // the patch's corner in its frame iu
  const int64_t iw = token % s.w, ih = token / s.w % s.h, it = token / s.w / s.h;
  const int64_t frame = it * s.u + iu;
  return static_cast<const T*>(s.data) + b * s.batch + (s.frames ? s.frames[frame] : frame) * s.frame + ih * s.p * s.row +
         iw * s.q * s.column;
}

// Starts to fetch a patch that is read soon: its rows lie too far apart for the processor to guess.
template <typename T>
static void prefetch_patch(const Patches& s, int64_t b, int64_t token) {
  const bool planes = s.channel >= s.q * s.column;  // each channel's row on its own
  for (int64_t iu = 0; iu < s.u; ++iu) {
    const T* row = patch_frame<T>(s, b, token, iu);
    for (int64_t ip = 0; ip < s.p; ++ip, row += s.row) {
      __builtin_prefetch(row);
      __builtin_prefetch(row + (s.q - 1) * s.column);
      for (int64_t c = 1; planes && c < s.C; ++c) __builtin_prefetch(row + c * s.channel);
    }
  }
}

template <typename T>
STMAE_INLINE void copy_row(T* to, const T* from, int64_t count) {
  if (count * sizeof(T) == 16) {  // 16 bytes, and 16 pixels of three: worth no call
    std::memcpy(static_cast<void*>(to), from, 16);
  } else if (count * sizeof(T) == 48) {
    std::memcpy(static_cast<void*>(to), from, 48);
  } else {
    std::memcpy(static_cast<void*>(to), from, count * sizeof(T));
  }
}

typedef uint8_t bytes16 __attribute__((vector_size(16)));

STMAE_INLINE bytes16 load_bytes(const uint8_t* p) {
  bytes16 x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}

// Three channels' rows -> pixels.
template <typename T>
static void join_channels(const T* row, int64_t channel, int64_t width, T* out) {
  int64_t x = 0;
  if constexpr (std::is_same_v<T, uint8_t>) {
    for (; x + 16 <= width; x += 16) {
      const bytes16 r = load_bytes(row + x), g = load_bytes(row + channel + x), b = load_bytes(row + 2 * channel + x);
      const bytes16 rg0 = __builtin_shufflevector(r, g, 0, 16, -1, 1, 17, -1, 2, 18, -1, 3, 19, -1, 4, 20, -1, 5);
      const bytes16 rg1 = __builtin_shufflevector(r, g, 21, -1, 6, 22, -1, 7, 23, -1, 8, 24, -1, 9, 25, -1, 10, 26);
      const bytes16 rg2 = __builtin_shufflevector(r, g, -1, 11, 27, -1, 12, 28, -1, 13, 29, -1, 14, 30, -1, 15, 31, -1);
      const bytes16 rgb[3] = {__builtin_shufflevector(rg0, b, 0, 1, 16, 3, 4, 17, 6, 7, 18, 9, 10, 19, 12, 13, 20, 15),
                              __builtin_shufflevector(rg1, b, 0, 21, 2, 3, 22, 5, 6, 23, 8, 9, 24, 11, 12, 25, 14, 15),
                              __builtin_shufflevector(rg2, b, 26, 1, 2, 27, 4, 5, 28, 7, 8, 29, 10, 11, 30, 13, 14, 31)};
      std::memcpy(out + 3 * x, rgb, sizeof(rgb));
    }
  }
  for (; x < width; ++x)
    for (int c = 0; c < 3; ++c) out[x * 3 + c] = row[c * channel + x];
}

// Pixels of three channels -> each channel's row.
template <typename T>
static void split_channels(const T* row, int64_t width, T* out, int64_t channel) {
  int64_t x = 0;
  if constexpr (std::is_same_v<T, uint8_t>) {
    for (; x + 16 <= width; x += 16) {
      const bytes16 p0 = load_bytes(row + 3 * x), p1 = load_bytes(row + 3 * x + 16), p2 = load_bytes(row + 3 * x + 32);
      const bytes16 r01 = __builtin_shufflevector(p0, p1, 0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30, -1, -1, -1, -1, -1);
      const bytes16 g01 = __builtin_shufflevector(p0, p1, 1, 4, 7, 10, 13, 16, 19, 22, 25, 28, 31, -1, -1, -1, -1, -1);
      const bytes16 b01 = __builtin_shufflevector(p0, p1, 2, 5, 8, 11, 14, 17, 20, 23, 26, 29, -1, -1, -1, -1, -1, -1);
      const bytes16 r = __builtin_shufflevector(r01, p2, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 17, 20, 23, 26, 29);
      const bytes16 g = __builtin_shufflevector(g01, p2, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 18, 21, 24, 27, 30);
      const bytes16 b = __builtin_shufflevector(b01, p2, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 19, 22, 25, 28, 31);
      std::memcpy(out + x, &r, sizeof(r));
      std::memcpy(out + channel + x, &g, sizeof(g));
      std::memcpy(out + 2 * channel + x, &b, sizeof(b));
    }
  }
  for (; x < width; ++x)
    for (int c = 0; c < 3; ++c) out[c * channel + x] = row[x * 3 + c];
}

// In the order (frame, row, column, channel).
template <typename T>
static void read_channels_last(const Patches& s, int64_t b, int64_t token, T* out) {
  const bool packed = (s.channel == 1 || s.C == 1) && (s.column == s.C || s.q == 1);  // a row of the patch lies as it is wanted
  for (int64_t iu = 0; iu < s.u; ++iu) {
    const T* row = patch_frame<T>(s, b, token, iu);
    for (int64_t ip = 0; ip < s.p; ++ip, row += s.row, out += s.q * s.C) {
      if (packed) {
        copy_row(out, row, s.q * s.C);
      } else if (s.column == 1 && s.C == 3) {
        join_channels(row, s.channel, s.q, out);
      } else {
        for (int64_t x = 0; x < s.q; ++x)
          for (int64_t c = 0; c < s.C; ++c) out[x * s.C + c] = row[c * s.channel + x * s.column];
      }
    }
  }
}

// In the order (channel, frame, row, column), that of a convolution's weight.
template <typename T>
static void read_channels_first(const Patches& s, int64_t b, int64_t token, T* out) {
  const int64_t plane = s.u * s.p * s.q;
  for (int64_t iu = 0; iu < s.u; ++iu) {
    const T* row = patch_frame<T>(s, b, token, iu);
    for (int64_t ip = 0; ip < s.p; ++ip, row += s.row, out += s.q) {
      if (s.column == 1) {
        for (int64_t c = 0; c < s.C; ++c) copy_row(out + c * plane, row + c * s.channel, s.q);
      } else if (s.C == 3 && s.channel == 1 && s.column == 3) {
        split_channels(row, s.q, out, plane);
      } else {
        for (int64_t c = 0; c < s.C; ++c)
          for (int64_t x = 0; x < s.q; ++x) out[c * plane + x] = row[c * s.channel + x * s.column];
      }
    }
  }
}

}  // namespace stmae::STMAE_ISA

// Reading one patch of a video (see video.h) into consecutive memory. Included once per instruction set, after simd.h.

namespace stmae::STMAE_ISA {

template <typename T>
static const T* patch_frame(const Patches& s, int64_t b, int64_t token, int64_t iu) {  // the patch's corner in its frame iu
  const int64_t iw = token % s.w, ih = token / s.w % s.h, it = token / s.w / s.h;
  const int64_t frame = it * s.u + iu;
  return static_cast<const T*>(s.data) + b * s.batch + (s.frames ? s.frames[frame] : frame) * s.frame + ih * s.p * s.row + iw * s.q * s.column;
}

template <int C, typename T>
static void join_channels(const T* row, int64_t channel, int64_t width, T* out) {
  for (int64_t x = 0; x < width; ++x)
    for (int c = 0; c < C; ++c) out[x * C + c] = row[c * channel + x];
}

template <int C, typename T>
static void split_channels(const T* row, int64_t width, T* out, int64_t channel) {
  for (int64_t x = 0; x < width; ++x)
    for (int c = 0; c < C; ++c) out[c * channel + x] = row[x * C + c];
}

// In the order (frame, row, column, channel).
template <typename T>
static void read_colour_last(const Patches& s, int64_t b, int64_t token, T* out) {
  const bool packed = (s.channel == 1 || s.C == 1) && (s.column == s.C || s.q == 1);  // a row of the patch lies as it is wanted
  for (int64_t iu = 0; iu < s.u; ++iu) {
    const T* row = patch_frame<T>(s, b, token, iu);
    for (int64_t ip = 0; ip < s.p; ++ip, row += s.row, out += s.q * s.C) {
      if (packed) {
        std::memcpy(static_cast<void*>(out), row, s.q * s.C * sizeof(T));
      } else if (s.column == 1 && s.C == 3) {
        join_channels<3>(row, s.channel, s.q, out);
      } else {
        for (int64_t x = 0; x < s.q; ++x)
          for (int64_t c = 0; c < s.C; ++c) out[x * s.C + c] = row[c * s.channel + x * s.column];
      }
    }
  }
}

// In the order (channel, frame, row, column), that of a convolution's weight.
template <typename T>
static void read_colour_first(const Patches& s, int64_t b, int64_t token, T* out) {
  const int64_t plane = s.u * s.p * s.q;
  for (int64_t iu = 0; iu < s.u; ++iu) {
    const T* row = patch_frame<T>(s, b, token, iu);
    for (int64_t ip = 0; ip < s.p; ++ip, row += s.row, out += s.q) {
      if (s.column == 1) {
        for (int64_t c = 0; c < s.C; ++c) std::memcpy(static_cast<void*>(out + c * plane), row + c * s.channel, s.q * sizeof(T));
      } else if (s.C == 3 && s.channel == 1 && s.column == 3) {
        split_channels<3>(row, s.q, out, plane);
      } else {
        for (int64_t c = 0; c < s.C; ++c)
          for (int64_t x = 0; x < s.q; ++x) out[c * plane + x] = row[c * s.channel + x * s.column];
      }
    }
  }
}

}  // namespace stmae::STMAE_ISA

// The target is read from the video one patch at a time, into the first-level cache, and compared there with the prediction:
// what moves through memory is the prediction once and the video's bytes once, in the forward and again in the backward.
#ifdef STMAE_ISA

#include "simd/vector_loop.h"
#include "simd/read_patch.h"

namespace stmae::STMAE_ISA {

// The patch's pixels as floats, normalised if they are bytes. Returns their sum.
template <typename T>
static float read_target(const PatchLoss& l, int64_t index, float* target) {
  const PatchLoss::Place at = l.place(index);
  T* raw = reinterpret_cast<T*>(target + (std::is_same_v<T, float> ? 0 : l.P));
  read_channels_last(*at.patches, at.b, at.token, raw);
  if (index + 1 < l.count) {
    const PatchLoss::Place next = l.place(index + 1);
    prefetch_patch<T>(*next.patches, next.b, next.token);
  }
  Accumulators sums = zero_accumulators();
  each_vector_unrolled(l.P, [&](int64_t i, auto lanes, int accumulator) STMAE_INLINE_BODY {
    vec x = load(raw + i, lanes);
    if constexpr (std::is_same_v<T, uint8_t>) x = keep_first(fma(x, load(l.scale + i, lanes), load(l.shift + i, lanes)), lanes);
    if constexpr (!std::is_same_v<T, float>) store(target + i, x, lanes);
    sums.v[accumulator] = sums.v[accumulator] + x;
  });
  return sum(sums);
}

// What follows is for statistics by channel. Value d of a patch belongs to channel d % C, so vectors that are C apart hold the same
// channels in the same lanes: a row of C vectors, C * kLanes values, is the pattern that repeats.

// sums[c] = sum over channel c of value(x, vector of the pattern), for x the vectors of `target`.
template <typename Value>
STMAE_INLINE void sum_by_channel(const float* target, int64_t P, int64_t C, float* sums, const Value& value) {
  std::fill(sums, sums + C, 0.f);
  const int64_t vectors = P / kLanes;
  float lanes[kLanes];
  for (int64_t first = 0; first < C; first += 4) {  // four sums at a time, which do not wait for each other
    const int64_t width = std::min<int64_t>(4, C - first);
    vec total[4] = {zero(), zero(), zero(), zero()};
    int64_t v = first;
    for (; v + 4 <= vectors && width == 4; v += C)
      for (int j = 0; j < 4; ++j) total[j] = total[j] + value(load(target + (v + j) * kLanes), (first + j) * kLanes);
    for (; v + 3 <= vectors && width == 3; v += C)
      for (int j = 0; j < 3; ++j) total[j] = total[j] + value(load(target + (v + j) * kLanes), (first + j) * kLanes);
    for (; v < vectors; v += C)
      for (int64_t j = 0; j < width && v + j < vectors; ++j)
        total[j] = total[j] + value(load(target + (v + j) * kLanes), (first + j) * kLanes);
    for (int64_t j = 0; j < width; ++j) {
      store(lanes, total[j]);
      for (int lane = 0; lane < kLanes; ++lane) sums[((first + j) * kLanes + lane) % C] += lanes[lane];
    }
  }
  if (vectors * kLanes < P) {
    store(lanes, value(load(target + vectors * kLanes, static_cast<int>(P % kLanes)), vectors % C * kLanes));
    for (int64_t d = vectors * kLanes; d < P; ++d) sums[d % C] += lanes[d - vectors * kLanes];
  }
}

// values[c] over the pattern.
static void spread(const float* values, int64_t C, float* pattern) {
  for (int64_t i = 0; i < C * kLanes; i += C) std::copy(values, values + C, pattern + i);
}

// target = (target - mean) * rstd, by channel.
static void normalize_by_channel(float* target, int64_t P, int64_t C, const float* mean, const float* rstd, float* scratch) {
  float *means = scratch, *rstds = scratch + C * kLanes;
  spread(mean, C, means);
  spread(rstd, C, rstds);
  int64_t pattern = 0;
  each_vector(P, [&](int64_t d, auto lanes) STMAE_INLINE_BODY {
    store(target + d, (load(target + d, lanes) - load(means + pattern)) * load(rstds + pattern), lanes);
    pattern = pattern + kLanes == C * kLanes ? 0 : pattern + kLanes;
  });
}

static void channel_statistics(const float* target, int64_t P, int64_t C, float* mean, float* rstd, float* scratch) {
  const float count = static_cast<float>(P / C);
  float *means = scratch, *off = scratch + C * kLanes;
  sum_by_channel(target, P, C, mean, [](vec x, int64_t) STMAE_INLINE_BODY { return x; });
  for (int64_t c = 0; c < C; ++c) mean[c] /= count;
  spread(mean, C, means);
  // As above: what the deviations sum to corrects the mean, and the variance.
  sum_by_channel(target, P, C, off, [&](vec x, int64_t i) STMAE_INLINE_BODY { return x - load(means + i); });
  sum_by_channel(target, P, C, rstd, [&](vec x, int64_t i) STMAE_INLINE_BODY {
    const vec d = x - load(means + i);
    return d * d;
  });
  for (int64_t c = 0; c < C; ++c) {
    mean[c] += off[c] / count;
    rstd[c] = 1.f / (std::sqrt(std::max(0.f, rstd[c] - off[c] * off[c] / count) / (count - 1)) + 1e-6f);
  }
}

template <typename T, typename Pred>
static void loss_range(const PatchLoss& l, float* target, int64_t begin, int64_t end) {
  const int64_t P = l.P;
  for (int64_t i = begin; i < end; ++i) {
    const Pred* pred = static_cast<const Pred*>(l.pred) + i / l.M * l.pred_batch + i % l.M * l.pred_token;
    float mean = read_target<T>(l, i, target) / P, rstd = 1.f;
    if (l.normalize == 2) {
      float *means = l.patch_mean + i * l.C, *rstds = l.patch_rstd + i * l.C, *scratch = target + l.statistics;
      channel_statistics(target, P, l.C, means, rstds, scratch);
      normalize_by_channel(target, P, l.C, means, rstds, scratch);
      mean = 0.f;
    } else if (l.normalize == 1) {
      // Deviations from a mean that is off by its rounding: what they sum to corrects the mean, and the variance.
      Accumulators off = zero_accumulators(), squares = zero_accumulators();
      each_vector_unrolled(P, [&](int64_t d, auto lanes, int accumulator) STMAE_INLINE_BODY {
        const vec x = keep_first(load(target + d, lanes) - set(mean), lanes);
        off.v[accumulator] = off.v[accumulator] + x;
        squares.v[accumulator] = fma(x, x, squares.v[accumulator]);
      });
      const float rest = sum(off);
      mean += rest / P;
      rstd = 1.f / std::sqrt(std::max(0.f, sum(squares) - rest * rest / P) / (P - 1) + 1e-6f);
    } else {
      mean = 0.f;
    }
    Accumulators error = zero_accumulators();
    each_vector_unrolled(P, [&](int64_t d, auto lanes, int accumulator) STMAE_INLINE_BODY {
      const vec x = (load(target + d, lanes) - set(mean)) * set(rstd);
      const vec e = keep_first(load(pred + d, lanes) - x, lanes);
      error.v[accumulator] = fma(e, e, error.v[accumulator]);
    });
    l.loss[i] = sum(error) / P;
    if (l.normalize == 2) continue;
    l.patch_mean[i] = mean;
    l.patch_rstd[i] = rstd;
  }
}

template <typename T, typename Pred>
static void loss_backward_range(const PatchLoss& l, float* target, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t b = i / l.M, m = i % l.M;
    const Pred* pred = static_cast<const Pred*>(l.pred) + b * l.pred_batch + m * l.pred_token;
    Pred* grad_pred = static_cast<Pred*>(l.grad_pred) + i * l.P;
    read_target<T>(l, i, target);
    vec mean = zero(), rstd = set(1.f);
    if (l.normalize == 2) {
      normalize_by_channel(target, l.P, l.C, l.patch_mean + i * l.C, l.patch_rstd + i * l.C, target + l.statistics);
    } else {
      mean = set(l.patch_mean[i]), rstd = set(l.patch_rstd[i]);
    }
    const vec factor = set(2.f / l.P * l.grad_loss[b * l.grad_batch + m * l.grad_token]);
    each_vector(l.P, [&](int64_t d, auto lanes) STMAE_INLINE_BODY {
      const vec x = (load(target + d, lanes) - mean) * rstd;
      store(grad_pred + d, (load(pred + d, lanes) - x) * factor, lanes);
    });
  }
}

template <typename T>
static void patch_loss_of(const PatchLoss& l, float* target, int64_t begin, int64_t end) {
  if (l.grad_pred) {
    l.pred_float ? loss_backward_range<T, float>(l, target, begin, end) : loss_backward_range<T, bf16>(l, target, begin, end);
  } else {
    l.pred_float ? loss_range<T, float>(l, target, begin, end) : loss_range<T, bf16>(l, target, begin, end);
  }
}

static void patch_loss_range(const PatchLoss& l, float* target, int64_t begin, int64_t end) {
  switch (l.patches.pixel) {
    case Pixel::uint8: return patch_loss_of<uint8_t>(l, target, begin, end);
    case Pixel::bfloat16: return patch_loss_of<bf16>(l, target, begin, end);
    case Pixel::float32: return patch_loss_of<float>(l, target, begin, end);
  }
}

}  // namespace stmae::STMAE_ISA

#else

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <tuple>
#include <type_traits>

#include "base/buffer.h"
#include "base/check.h"
#include "base/parallel.h"
#include "base/sequences.h"
#include "base/token_ids.h"
#include "base/patches.h"

namespace stmae {

struct PatchLoss {
  const void* pred;       // [B, M, P]
  const int64_t* masked;  // [B, M]
  int64_t count, M, P, C, pred_batch, pred_token, masked_batch, masked_token;
  int64_t statistics;  // where in the scratch memory of a thread, behind its target, those by channel are spread out
  int64_t normalize;   // 0: not, 1: by the patch's mean and variance, 2: by each channel's
  bool pred_float;
  Patches patches;                        // of a list of videos, the first's
  const Patches* videos;                  // of a list of videos (then M counts all, and so do token ids), else null
  const int64_t* first_tokens;            // of each of them
  const int32_t* video_of_row;            // [M]
  const float *scale, *shift;             // [P], each channel's repeated
  float *loss, *patch_mean, *patch_rstd;  // [B, M], by channel the last two [B, M, C]; the backward only reads those
  const float* grad_loss;                 // [B, M], null in the forward
  int64_t grad_batch, grad_token;
  void* grad_pred;  // [B, M, P], null in the forward

  struct Place {  // where a patch lies
    const Patches* patches;
    int64_t b, token;
  };
  Place place(int64_t index) const {
    const int64_t id = masked[index / M * masked_batch + index % M * masked_token];
    if (!videos) return {&patches, index / M, id};
    const int32_t video = video_of_row[index];
    return {videos + video, 0, id - first_tokens[video]};
  }
};

}  // namespace stmae

#define STMAE_KERNEL_FILE "cpu/patch_loss.cpp"
#include "base/for_each_isa.h"

namespace stmae {
namespace {

using torch::stable::Tensor;

struct Values {  // scale and shift for each of the P values of a patch, channels last
  std::vector<float> scale, shift;
  Values() = default;
  Values(const Normalization& channel, int64_t P) : scale(P), shift(P) {
    for (int64_t i = 0; i < P; ++i) {
      scale[i] = channel.scale[i % channel.scale.size()];
      shift[i] = channel.shift[i % channel.shift.size()];
    }
  }
};

// Checks what both passes read. The result points into `values`, which is filled.
PatchLoss describe(const char* op, const Tensor& pred, const Tensor& video, const Tensor& masked,
                   const std::vector<int64_t>& patch_size, const std::vector<int64_t>& frames, const std::vector<double>& mean,
                   const std::vector<double>& std, Values& values) {
  check_tensor(op, "pred", pred, {kAny, kAny, kAny}, floating());
  check_dense_rows(op, "pred", pred);
  check_tensor(op, "masked", masked, {pred.size(0), pred.size(1)}, ScalarType::Long);
  PatchLoss l{};
  l.patches = patches(op, video, pred.size(0), patch_size, &frames);
  STMAE_CHECK(pred.size(2) == l.patches.values(), op, ": expected pred [B, M, ", l.patches.values(), "], got ", shape(pred));
  values = Values(Normalization(op, mean, std, l.patches.C), l.patches.values());
  l.pred = pred.const_data_ptr();
  l.masked = masked.const_data_ptr<int64_t>();
  l.count = masked.numel();
  l.M = pred.size(1);
  l.P = pred.size(2);
  l.C = video.size(1);
  l.statistics = (2 * l.P + 31) / 16 * 16;  // behind the target, and the same as the video stores it
  l.pred_batch = pred.stride(0);
  l.pred_token = pred.stride(1);
  l.masked_batch = masked.stride(0);
  l.masked_token = masked.stride(1);
  l.pred_float = pred.scalar_type() == ScalarType::Float;
  l.scale = values.scale.data();
  l.shift = values.shift.data();
  inverse_ids(op, "masked", masked, pred.size(0), l.patches.tokens());
  return l;
}

// The same for a list of videos; it points into what is kept here.
struct ListOfVideos {
  PatchesOfVideos patches;
  std::vector<int32_t> video_of_row;
  Values values;

  ListOfVideos(const char* op, const Tensor& pred, const std::vector<Tensor>& videos, const std::vector<int64_t>& patch_size,
               const std::vector<int64_t>& frames, const std::vector<int64_t>& frame_counts, const std::vector<double>& mean)
      : patches(op, videos, static_cast<int64_t>(mean.size()), patch_size, frames, frame_counts) {}

  PatchLoss describe(const char* op, const Tensor& pred, const Tensor& masked, const Tensor& cu_seqlens,
                     const std::vector<int64_t>& patch_size, const std::vector<double>& mean, const std::vector<double>& std) {
    check_tensor(op, "pred", pred, {kAny, kAny}, floating());
    check_dense_rows(op, "pred", pred);
    check_contiguous_tensor(op, "masked", masked, {pred.size(0)}, ScalarType::Long);
    STMAE_CHECK(patch_size.size() == 3 && patch_size[0] > 0 && patch_size[1] > 0 && patch_size[2] > 0, op,
                ": expected a patch of 3 sizes");
    STMAE_CHECK(!mean.empty(), op, ": expected mean of one channel or more, got none");
    const int64_t C = static_cast<int64_t>(mean.size());
    PatchLoss l{};
    l.P = checked_product(op, {patch_size[0], patch_size[1], patch_size[2], C});
    STMAE_CHECK(pred.size(1) == l.P, op, ": expected pred [M, ", l.P, "], got ", shape(pred));
    const auto offsets = sequence_offsets(op, "cu_seqlens", cu_seqlens, masked.size(0), "masked");
    STMAE_CHECK(offsets.size() == patches.first_tokens.size(), op, ": expected cu_seqlens of ", patches.videos.size(),
                " videos, got that of ", offsets.size() - 1);
    check_own_tokens(op, "masked", masked.const_data_ptr<int64_t>(), 1, offsets, patches.first_tokens);
    inverse_ids(op, "masked", torch::stable::view(masked, {1, masked.size(0)}), 1, patches.first_tokens.back());
    video_of_row = sequence_of_rows(offsets);
    values = Values(Normalization(op, mean, std, C), l.P);
    if (!patches.videos.empty()) l.patches = patches.videos[0];
    l.videos = patches.videos.data();
    l.first_tokens = patches.first_tokens.data();
    l.video_of_row = video_of_row.data();
    l.pred = pred.const_data_ptr();
    l.masked = masked.const_data_ptr<int64_t>();
    l.count = l.M = masked.size(0);
    l.C = C;
    l.statistics = (2 * l.P + 31) / 16 * 16;
    l.pred_token = pred.stride(0);
    l.masked_token = 1;
    l.pred_float = pred.scalar_type() == ScalarType::Float;
    l.scale = values.scale.data();
    l.shift = values.shift.data();
    return l;
  }
};

void run(const PatchLoss& l) {
  if (l.count == 0) return;
  const int64_t workers = num_workers(l.count, std::max<int64_t>(1, 16384 / l.P));
  const int64_t scratch = l.statistics + (l.normalize == 2 ? 2 * 16 * l.C : 0);
  Buffer<float> target(workers * scratch);
  parallel_for_static(l.count, workers, [&](int64_t worker, int64_t begin, int64_t end) {
    STMAE_DISPATCH(patch_loss_range, l, target.data() + worker * scratch, begin, end);
  });
}

std::tuple<Tensor, Tensor, Tensor> forward(const char* op, PatchLoss l, const Tensor& pred, const Tensor& masked,
                                           int64_t normalize);
Tensor backward(const char* op, PatchLoss l, const Tensor& grad_loss, const Tensor& pred, const Tensor& masked,
                const Tensor& patch_mean, const Tensor& patch_rstd);

std::tuple<Tensor, Tensor, Tensor> patch_loss(const Tensor& pred, const Tensor& video, const Tensor& masked,
                                              std::vector<int64_t> patch_size, std::vector<int64_t> frames, int64_t normalize,
                                              std::vector<double> mean, std::vector<double> std) {
  const char* op = "patch_loss";
  Values values;
  return forward(op, describe(op, pred, video, masked, patch_size, frames, mean, std, values), pred, masked, normalize);
}

std::tuple<Tensor, Tensor, Tensor> patch_loss_varlen(const Tensor& pred, std::vector<Tensor> videos, const Tensor& masked,
                                                     const Tensor& cu_seqlens, std::vector<int64_t> patch_size,
                                                     std::vector<int64_t> frames, std::vector<int64_t> frame_counts,
                                                     int64_t normalize, std::vector<double> mean, std::vector<double> std) {
  const char* op = "patch_loss_varlen";
  ListOfVideos list(op, pred, videos, patch_size, frames, frame_counts, mean);
  return forward(op, list.describe(op, pred, masked, cu_seqlens, patch_size, mean, std), pred, masked, normalize);
}

std::tuple<Tensor, Tensor, Tensor> forward(const char* op, PatchLoss l, const Tensor& pred, const Tensor& masked,
                                           int64_t normalize) {
  STMAE_CHECK(normalize >= 0 && normalize <= 2, op, ": expected normalize 0, 1 or 2, got ", normalize);
  const int64_t together = normalize == 2 ? l.P / l.C : l.P;
  STMAE_CHECK(!normalize || together > 1, op, ": expected at least 2 values to normalise, got ", together);
  std::vector<int64_t> statistics = sizes_of(masked);
  if (normalize == 2) statistics.push_back(l.C);
  Tensor loss = torch::stable::new_empty(pred, masked.sizes(), ScalarType::Float);
  Tensor patch_mean = torch::stable::new_empty(pred, statistics, ScalarType::Float);
  Tensor patch_rstd = torch::stable::new_empty(pred, statistics, ScalarType::Float);
  l.normalize = normalize;
  l.loss = loss.mutable_data_ptr<float>();
  l.patch_mean = patch_mean.mutable_data_ptr<float>();
  l.patch_rstd = patch_rstd.mutable_data_ptr<float>();
  run(l);
  return {loss, patch_mean, patch_rstd};
}

Tensor patch_loss_backward(const Tensor& grad_loss, const Tensor& pred, const Tensor& video, const Tensor& masked,
                           const Tensor& patch_mean, const Tensor& patch_rstd, std::vector<int64_t> patch_size,
                           std::vector<int64_t> frames, std::vector<double> mean, std::vector<double> std) {
  const char* op = "patch_loss_backward";
  Values values;
  return backward(op, describe(op, pred, video, masked, patch_size, frames, mean, std, values), grad_loss, pred, masked,
                  patch_mean, patch_rstd);
}

Tensor patch_loss_varlen_backward(const Tensor& grad_loss, const Tensor& pred, std::vector<Tensor> videos, const Tensor& masked,
                                  const Tensor& cu_seqlens, const Tensor& patch_mean, const Tensor& patch_rstd,
                                  std::vector<int64_t> patch_size, std::vector<int64_t> frames, std::vector<int64_t> frame_counts,
                                  std::vector<double> mean, std::vector<double> std) {
  const char* op = "patch_loss_varlen_backward";
  ListOfVideos list(op, pred, videos, patch_size, frames, frame_counts, mean);
  return backward(op, list.describe(op, pred, masked, cu_seqlens, patch_size, mean, std), grad_loss, pred, masked, patch_mean,
                  patch_rstd);
}

Tensor backward(const char* op, PatchLoss l, const Tensor& grad_loss, const Tensor& pred, const Tensor& masked,
                const Tensor& patch_mean, const Tensor& patch_rstd) {
  l.normalize = patch_mean.dim() == masked.dim() + 1 ? 2 : 1;
  std::vector<int64_t> statistics = sizes_of(masked);
  if (l.normalize == 2) statistics.push_back(l.C);
  check_tensor(op, "grad_loss", grad_loss, sizes_of(masked), ScalarType::Float);
  check_contiguous_tensor(op, "patch_mean", patch_mean, statistics, ScalarType::Float);
  check_contiguous_tensor(op, "patch_rstd", patch_rstd, statistics, ScalarType::Float);
  Tensor grad_pred = torch::stable::new_empty(pred, pred.sizes());
  l.patch_mean = const_cast<float*>(patch_mean.const_data_ptr<float>());
  l.patch_rstd = const_cast<float*>(patch_rstd.const_data_ptr<float>());
  l.grad_loss = grad_loss.const_data_ptr<float>();
  l.grad_batch = masked.dim() == 2 ? grad_loss.stride(0) : 0;
  l.grad_token = grad_loss.stride(masked.dim() - 1);
  l.grad_pred = grad_pred.mutable_data_ptr();
  run(l);
  return grad_pred;
}

STABLE_TORCH_LIBRARY_IMPL(stmae, CPU, m) {
  m.impl("patch_loss", TORCH_BOX(&patch_loss));
  m.impl("patch_loss_backward", TORCH_BOX(&patch_loss_backward));
  m.impl("patch_loss_varlen", TORCH_BOX(&patch_loss_varlen));
  m.impl("patch_loss_varlen_backward", TORCH_BOX(&patch_loss_varlen_backward));
}

}  // namespace
}  // namespace stmae

#endif

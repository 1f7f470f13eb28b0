// The visible patches are gathered from the video and normalised, some megabytes at a time, into panels of kPanel patches. A
// tile of the product, kRows outputs x kPanel patches, stays in registers while the weight's elements, as they lie in memory,
// are broadcast and the panel's rows are read as vectors. The backward gathers again, into panels of kPanel pixels of
// all patches, and sums over patches. Nothing has the size of the video.
#ifdef STMAE_ISA

#include "simd/vector_loop.h"
#include "simd/gemm.h"
#include "simd/read_patch.h"
#include "cpu/masked_patchify/forward.h"
#include "cpu/masked_patchify/backward.h"

#else

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <type_traits>

#include "base/buffer.h"
#include "base/check.h"
#include "base/parallel.h"
#include "base/sequences.h"
#include "base/token_ids.h"
#include "base/patches.h"
#include "cpu/masked_patchify/params.h"

#define STMAE_KERNEL_FILE "cpu/masked_patchify/masked_patchify.cpp"
#include "base/for_each_isa.h"

namespace stmae {
namespace {

using torch::stable::Tensor;

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

void check_video(const char* op, const Tensor& video) {
  STMAE_CHECK(video.dim() == 5, op, ": expected video [B, C, T, H, W], got ", shape(video));
}

// What the sums of a product can be stored in.
DTypes output_dtypes(const Patchify& p) { return p.weight_float ? DTypes(ScalarType::Float) : floating(); }

// Checks what both passes read, but position, which is checked against the output.
Patchify describe(const char* op, const Tensor& video, const Tensor& keep, const Tensor& weight,
                  const std::optional<Tensor>& bias, const Normalization& normalization) {
  check_contiguous_tensor(op, "weight", weight, {kAny, video.size(1), kAny, kAny, kAny}, floating());
  if (bias) check_contiguous_tensor(op, "bias", *bias, {weight.size(0)}, weight.scalar_type());
  Patchify p{};
  p.patches = patches(op, video, keep.size(0), {weight.size(2), weight.size(3), weight.size(4)}, nullptr);
  p.scale = normalization.scale.data();
  p.shift = normalization.shift.data();
  p.keep = keep.const_data_ptr<int64_t>();
  p.keep_batch = keep.stride(0);
  p.keep_token = keep.stride(1);
  p.B = keep.size(0);
  p.K = keep.size(1);
  p.N = p.patches.tokens();
  p.D = weight.size(0);
  p.P = p.patches.values();
  p.weight_float = weight.scalar_type() == ScalarType::Float;
  p.total = keep.numel();
  return p;
}

// A list of videos, described; the description points into what is kept here.
struct ListOfVideos {
  PatchesOfVideos patches;
  std::vector<int32_t> video_of_row;

  ListOfVideos(const char* op, const std::vector<Tensor>& videos, const Tensor& weight)
      : patches(op, videos, weight.size(1), {weight.size(2), weight.size(3), weight.size(4)}) {}

  Patchify describe(const char* op, const Tensor& keep, const Tensor& cu_seqlens, const Tensor& weight,
                    const std::optional<Tensor>& bias, const Normalization& normalization) {
    if (bias) check_contiguous_tensor(op, "bias", *bias, {weight.size(0)}, weight.scalar_type());
    const auto offsets = sequence_offsets(op, "cu_seqlens", cu_seqlens, keep.size(0), "keep");
    STMAE_CHECK(offsets.size() == patches.first_tokens.size(), op, ": expected cu_seqlens of ", patches.videos.size(),
                " videos, got that of ", offsets.size() - 1);
    check_own_tokens(op, "keep", keep.const_data_ptr<int64_t>(), keep.stride(0), offsets, patches.first_tokens);
    video_of_row = sequence_of_rows(offsets);
    Patchify p{};
    if (!patches.videos.empty()) p.patches = patches.videos[0];
    p.videos = patches.videos.data();
    p.first_tokens = patches.first_tokens.data();
    p.video_of_row = video_of_row.data();
    p.scale = normalization.scale.data();
    p.shift = normalization.shift.data();
    p.keep = keep.const_data_ptr<int64_t>();
    p.keep_token = keep.stride(0);
    p.B = 1;
    p.K = p.total = keep.size(0);
    p.N = patches.first_tokens.back();
    p.D = weight.size(0);
    p.P = checked_product(op, {weight.size(1), weight.size(2), weight.size(3), weight.size(4)});
    p.weight_float = weight.scalar_type() == ScalarType::Float;
    return p;
  }
};

void check_weight(const char* op, const Tensor& weight) {
  check_contiguous_tensor(op, "weight", weight, {kAny, kAny, kAny, kAny, kAny}, floating());
}

// keep [K] as one row of ids.
Buffer<int32_t> inverse_of_row(const char* op, const Tensor& keep, int64_t tokens) {
  return inverse_ids(op, "keep", torch::stable::view(keep, {1, keep.size(0)}), 1, tokens);
}

// out [B, K, D], or of a list of videos [K, D].
Tensor forward(const char* op, Patchify p, const Tensor& weight, const std::optional<Tensor>& bias,
               const std::optional<Tensor>& position, const std::vector<int64_t>& sizes) {
  if (position) check_contiguous_tensor(op, "position", *position, {p.N, p.D}, output_dtypes(p));
  Tensor out = torch::stable::new_empty(position ? *position : weight, sizes);
  p.out_float = out.scalar_type() == ScalarType::Float;
  p.out = out.mutable_data_ptr();
  p.weight = weight.const_data_ptr();
  p.weight_row = p.P;
  p.bias = bias ? bias->const_data_ptr() : nullptr;
  p.position = position ? position->const_data_ptr() : nullptr;
  if (out.numel() == 0) return out;
  std::vector<c10::BFloat16> padded;
  if (!p.weight_float && p.P % 2) {  // bfloat16 is read in pairs, and a row's last one must not reach into the next row
    p.weight_row = p.P + 1;
    padded.resize(checked_product(op, {p.D, p.weight_row}));
    for (int64_t d = 0; d < p.D; ++d)
      std::copy_n(weight.const_data_ptr<c10::BFloat16>() + d * p.P, p.P, padded.data() + d * p.weight_row);
    p.weight = padded.data();
  }
  const int64_t groups = (std::min(p.total, kPart) + kGroup - 1) / kGroup, workers = num_workers(groups, 1);
  const int64_t scratch = (kGroup + 1) * p.P + kGroup;
  Buffer<float> patch_rows(checked_product(op, {workers, scratch}));
  Buffer<float> panels(round_up(std::min(p.total, kPart), kPanel) * p.P);
  p.panels = panels.data();
  for (p.first = 0; p.first < p.total; p.first += kPart) {
    p.count = std::min(kPart, p.total - p.first);
    parallel_for_static((p.count + kGroup - 1) / kGroup, workers, [&](int64_t worker, int64_t begin, int64_t end) {
      STMAE_DISPATCH(patchify_pack, p, patch_rows.data() + worker * scratch, begin, end);
    });
    const int64_t tasks = (p.count + kPanel - 1) / kPanel * ((p.D + kRows - 1) / kRows);
    parallel_for(tasks, 1, [&](int64_t begin, int64_t end) { STMAE_DISPATCH(patchify_tiles, p, begin, end); });
  }
  return out;
}

Tensor masked_patchify(const Tensor& video, const Tensor& keep, const Tensor& weight, std::optional<Tensor> bias,
                       std::optional<Tensor> position, std::vector<double> mean, std::vector<double> std) {
  const char* op = "masked_patchify";
  check_tensor(op, "keep", keep, {kAny, kAny}, ScalarType::Long);
  check_video(op, video);
  const Normalization normalization(op, mean, std, video.size(1));
  const Patchify p = describe(op, video, keep, weight, bias, normalization);
  inverse_ids(op, "keep", keep, p.B, p.N);
  return forward(op, p, weight, bias, position, {p.B, p.K, p.D});
}

Tensor masked_patchify_varlen(std::vector<Tensor> videos, const Tensor& keep, const Tensor& cu_seqlens, const Tensor& weight,
                              std::optional<Tensor> bias, std::optional<Tensor> position, std::vector<double> mean,
                              std::vector<double> std) {
  const char* op = "masked_patchify_varlen";
  check_contiguous_tensor(op, "keep", keep, {kAny}, ScalarType::Long);
  check_weight(op, weight);
  const Normalization normalization(op, mean, std, weight.size(1));
  ListOfVideos list(op, videos, weight);
  const Patchify p = list.describe(op, keep, cu_seqlens, weight, bias, normalization);
  inverse_of_row(op, keep, p.N);
  return forward(op, p, weight, bias, position, {p.K, p.D});
}

std::tuple<Tensor, Tensor, Tensor> backward(const char* op, Patchify p, Buffer<int32_t> inverse, const Tensor& grad_out,
                                            const Tensor& weight, const std::optional<Tensor>& bias,
                                            const std::optional<Tensor>& position, const std::vector<int64_t>& sizes) {
  check_contiguous_tensor(op, "grad_out", grad_out, sizes, output_dtypes(p));
  if (position) check_contiguous_tensor(op, "position", *position, {p.N, p.D}, grad_out.scalar_type());
  Tensor grad_weight = torch::stable::new_empty(weight, weight.sizes());
  Tensor grad_bias = torch::stable::new_empty(weight, {bias ? p.D : 0});
  Tensor grad_position = position ? torch::stable::new_empty(*position, {p.N, p.D}) : torch::stable::new_empty(weight, {0});
  p.out_float = grad_out.scalar_type() == ScalarType::Float;
  p.grad_out = grad_out.const_data_ptr();
  p.inverse = inverse.data();
  p.grad_weight = grad_weight.mutable_data_ptr();
  p.grad_bias = grad_bias.mutable_data_ptr();
  p.grad_position = grad_position.mutable_data_ptr();
  if (p.total == 0 || p.D == 0) {
    torch::stable::zero_(grad_weight);
    if (bias) torch::stable::zero_(grad_bias);
    if (position) torch::stable::zero_(grad_position);
    return {grad_weight, grad_bias, grad_position};
  }
  const int64_t max_count = std::min(p.total, kPart), workers = num_workers(max_count, 8),
                scratch = std::max(4 * p.P, p.D) + kGroup;
  Buffer<float> patch_rows(checked_product(op, {workers, scratch}));
  Buffer<float> panels(max_count * round_up(p.P, kPanel));
  Buffer<float> packed_grad(checked_product(op, {max_count, round_up(p.D, kRows)}));
  Buffer<float> sum(!p.weight_float && p.total > kPart ? checked_product(op, {p.D, p.P}) : 0);
  p.panels = panels.data();
  p.packed_grad = packed_grad.data();
  Buffer<const void*> clips(checked_product(op, {workers, p.B}));
  p.weight_sum = p.weight_float ? grad_weight.mutable_data_ptr<float>() : sum.data();
  int64_t elements = 1;
  STMAE_DISPATCH(patchify_pack_size, p, &elements);
  for (p.first = 0; p.first < p.total; p.first += kPart) {
    p.count = std::min(kPart, p.total - p.first);
    parallel_for_static((p.count + elements - 1) / elements, workers, [&](int64_t worker, int64_t begin, int64_t end) {
      STMAE_DISPATCH(patchify_backward_pack, p, patch_rows.data() + worker * scratch, begin, end);
      if (p.first > 0) return;  // the other two gradients need no panels: here, they cost no threads of their own
      const auto part_begin = [&](int64_t count) { return count * worker / workers; };
      const auto part_end = [&](int64_t count) { return count * (worker + 1) / workers; };
      if (bias) STMAE_DISPATCH(patchify_grad_bias, p, part_begin(p.D), part_end(p.D));
      if (position) STMAE_DISPATCH(patchify_grad_position, p, clips.data() + worker * p.B, part_begin(p.N), part_end(p.N));
    });
    const int64_t tasks = (p.P + kPanel - 1) / kPanel * ((p.D + kRows - 1) / kRows);
    parallel_for(tasks, 1, [&](int64_t begin, int64_t end) { STMAE_DISPATCH(patchify_backward_tiles, p, begin, end); });
  }
  return {grad_weight, grad_bias, grad_position};
}

std::tuple<Tensor, Tensor, Tensor> masked_patchify_backward(const Tensor& grad_out, const Tensor& video, const Tensor& keep,
                                                            const Tensor& weight, std::optional<Tensor> bias,
                                                            std::optional<Tensor> position, std::vector<double> mean,
                                                            std::vector<double> std) {
  const char* op = "masked_patchify_backward";
  check_tensor(op, "keep", keep, {kAny, kAny}, ScalarType::Long);
  check_video(op, video);
  const Normalization normalization(op, mean, std, video.size(1));
  const Patchify p = describe(op, video, keep, weight, bias, normalization);
  return backward(op, p, inverse_ids(op, "keep", keep, p.B, p.N), grad_out, weight, bias, position, {p.B, p.K, p.D});
}

std::tuple<Tensor, Tensor, Tensor> masked_patchify_varlen_backward(const Tensor& grad_out, std::vector<Tensor> videos,
                                                                   const Tensor& keep, const Tensor& cu_seqlens,
                                                                   const Tensor& weight, std::optional<Tensor> bias,
                                                                   std::optional<Tensor> position, std::vector<double> mean,
                                                                   std::vector<double> std) {
  const char* op = "masked_patchify_varlen_backward";
  check_contiguous_tensor(op, "keep", keep, {kAny}, ScalarType::Long);
  check_weight(op, weight);
  const Normalization normalization(op, mean, std, weight.size(1));
  ListOfVideos list(op, videos, weight);
  const Patchify p = list.describe(op, keep, cu_seqlens, weight, bias, normalization);
  return backward(op, p, inverse_of_row(op, keep, p.N), grad_out, weight, bias, position, {p.K, p.D});
}

STABLE_TORCH_LIBRARY_IMPL(stmae, CPU, m) {
  m.impl("masked_patchify", TORCH_BOX(&masked_patchify));
  m.impl("masked_patchify_backward", TORCH_BOX(&masked_patchify_backward));
  m.impl("masked_patchify_varlen", TORCH_BOX(&masked_patchify_varlen));
  m.impl("masked_patchify_varlen_backward", TORCH_BOX(&masked_patchify_varlen_backward));
}

}  // namespace
}  // namespace stmae

#endif

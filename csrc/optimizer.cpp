#include "optimizer.h"

#include <algorithm>

#include "thread_pool.h"

namespace llmdpd {
namespace {

constexpr std::ptrdiff_t kStretch = 1 << 14;  // numbers of a task: 64 KiB of each array

struct Stretch {
  std::size_t tensor;
  std::ptrdiff_t first, count;
};

std::vector<Stretch> stretches_of(const std::vector<Numbers>& tensors) {
  std::vector<Stretch> stretches;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    for (std::ptrdiff_t first = 0; first < tensors[i].count; first += kStretch) {
      stretches.push_back({i, first, std::min(kStretch, tensors[i].count - first)});
    }
  }
  return stretches;
}

// Calls body(tensor, stretch, number) for each stretch. Small tensors share a task.
template <class Body>
void for_stretches(const std::vector<Numbers>& tensors, const std::vector<Stretch>& stretches, int threads,
                   const Body& body) {
  std::vector<int> begins;  // of each task
  std::ptrdiff_t filled = kStretch;
  for (std::size_t i = 0; i < stretches.size(); ++i) {
    if (filled + stretches[i].count > kStretch) {
      begins.push_back(static_cast<int>(i));
      filled = 0;
    }
    filled += stretches[i].count;
  }
  const int tasks = static_cast<int>(begins.size());
  begins.push_back(static_cast<int>(stretches.size()));
  parallel_for(tasks, threads, [&](int task) {
    for (int i = begins[task]; i < begins[task + 1]; ++i) body(tensors[stretches[i].tensor], stretches[i], i);
  });
}

}  // namespace

double sum_of_squares(const std::vector<Numbers>& tensors, const LayerKernels& kernels, int threads) {
  const std::vector<Stretch> stretches = stretches_of(tensors);
  std::vector<double> sums(stretches.size());
  for_stretches(tensors, stretches, threads, [&](const Numbers& tensor, const Stretch& part, int number) {
    sums[number] = kernels.sum_of_squares(tensor.from + part.first, part.count);
  });
  double sum = 0.0;
  for (const double part : sums) sum += part;
  return sum;
}

void adamw(const AdamW& step, const std::vector<Numbers>& tensors, const LayerKernels& kernels, int threads,
           float rate) {
  const std::vector<Stretch> stretches = stretches_of(tensors);
  for_stretches(tensors, stretches, threads, [&](const Numbers& tensor, const Stretch& part, int) {
    kernels.adamw(step, part.count, tensor.from + part.first, tensor.mean + part.first, tensor.square + part.first,
                  tensor.to + part.first);
    if (tensor.average) kernels.average(rate, part.count, tensor.to + part.first, tensor.average + part.first);
  });
}

void average(float rate, const std::vector<Numbers>& tensors, const LayerKernels& kernels, int threads) {
  const std::vector<Stretch> stretches = stretches_of(tensors);
  for_stretches(tensors, stretches, threads, [&](const Numbers& tensor, const Stretch& part, int) {
    kernels.average(rate, part.count, tensor.from + part.first, tensor.to + part.first);
  });
}

double add_up(const std::vector<Numbers>& tensors, const std::vector<const float*>& rows, const LayerKernels& kernels,
              int threads) {
  const std::vector<Stretch> stretches = stretches_of(tensors);
  std::vector<std::ptrdiff_t> begins;  // of each stretch, in a row
  std::ptrdiff_t begin = 0;
  for (const Stretch& part : stretches) {
    begins.push_back(begin);
    begin += part.count;
  }
  std::vector<double> sums(stretches.size());
  for_stretches(tensors, stretches, threads, [&](const Numbers& tensor, const Stretch& part, int number) {
    float* to = tensor.to + part.first;
    for (const float* row : rows) kernels.add(part.count, row + begins[number], to);
    sums[number] = kernels.sum_of_squares(to, part.count);
  });
  double sum = 0.0;
  for (const double part : sums) sum += part;
  return sum;
}

}  // namespace llmdpd

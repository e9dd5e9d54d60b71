// Files of exported policies and prompts (llmdpd/export/container.py). Whatever bytes they hold, reading them ends in
// tensors within the file or in a `Failure`.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "memory.h"

namespace llmdpd {

// What a function of the C interface returns as its code and message.
class Failure : public std::runtime_error {
 public:
  Failure(int failure_code, const std::string& message) : std::runtime_error(message), code(failure_code) {}
  const int code;
};

// Throws it for a file that is not what it should be.
[[noreturn]] void refuse(const std::string& what);

enum class FileKind : std::uint32_t { kPolicy = 1, kPrompt = 2 };

struct Tensor {
  enum Type : std::uint32_t { kFloat = 1, kInteger = 2, kDouble = 3 };
  Type type;
  std::vector<int> shape;
  const void* data;
  std::size_t count;
};

class File {
 public:
  // The bytes are copied. Throws `Failure`.
  File(const void* bytes, std::size_t size, FileKind kind);

  std::uint64_t fingerprint() const { return fingerprint_; }
  bool has(const std::string& name) const { return tensors_.count(name) > 0; }
  // Any shape of so many dimensions.
  const Tensor& tensor(const std::string& name, Tensor::Type type, std::size_t dims) const;
  // Of exactly this shape.
  const float* floats(const std::string& name, std::initializer_list<int> shape) const;
  const double* doubles(const std::string& name, std::initializer_list<int> shape) const;
  const std::int32_t* integers(const std::string& name, std::initializer_list<int> shape) const;

 private:
  const Tensor& exact(const std::string& name, Tensor::Type type, std::initializer_list<int> shape) const;

  Arena memory_;
  std::uint64_t fingerprint_ = 0;
  std::map<std::string, Tensor> tensors_;
};

std::vector<unsigned char> read_bytes(const char* path);

}  // namespace llmdpd

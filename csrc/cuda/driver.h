// The CUDA driver's API, as far as kernels are loaded and launched by it; found at run time, so that no toolkit is
// needed to build.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace llmdpd::cuda {

// The driver's library, open for as long as this lives. Of its types: results and devices are ints, handles pointers.
class Driver {
 public:
  // Throws std::runtime_error where the library, or a function in it, is absent.
  explicit Driver(const std::string& library);
  ~Driver();
  Driver(const Driver&) = delete;
  Driver& operator=(const Driver&) = delete;

  // Throws std::runtime_error with the driver's words for a result other than success.
  void check(int result, const char* function) const;

  int (*init)(unsigned flags);
  int (*error_string)(int result, const char** text);
  int (*current_device)(int* device);
  int (*retain_context)(void** context, int device);
  int (*push_context)(void* context);
  int (*pop_context)(void** context);
  int (*load_module)(void** module, const void* image);
  int (*get_function)(void** function, void* module, const char* name);
  int (*set_attribute)(void* function, int attribute, int value);
  int (*launch_kernel)(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                       unsigned block_y, unsigned block_z, unsigned shared, void* stream, void** parameters,
                       void** extra);

 private:
  template <class Function>
  void find(Function*& function, const char* name);

  void* library_ = nullptr;
};

// One argument of a kernel: a pointer, or a number of 4 or 8 bytes.
union Argument {
  std::uint64_t pointer;
  std::int32_t i32;
  std::int64_t i64;
  float f32;
};

// A kernel that triton compiled, on one device. It stays loaded: a captured graph may launch it as long as the process
// lives.
class Kernel {
 public:
  Kernel(std::shared_ptr<Driver> driver, const std::string& image, const std::string& name, int device,
         unsigned threads, unsigned shared);

  // Launch programs x members blocks on a stream of the device. Behind the arguments go two null pointers: triton's
  // scratch memories, which these kernels don't use.
  void launch(unsigned programs, unsigned members, std::uintptr_t stream, std::vector<Argument>& arguments) const;

 private:
  std::shared_ptr<Driver> driver_;
  int device_;
  unsigned threads_, shared_;
  void* context_ = nullptr;
  void* function_ = nullptr;
};

}  // namespace llmdpd::cuda

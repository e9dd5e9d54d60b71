#include "driver.h"

#include <dlfcn.h>

#include <stdexcept>
#include <utility>

namespace llmdpd::cuda {

namespace {

constexpr unsigned kPlainShared = 48 << 10;  // bytes that a block can have without being asked for
constexpr int kDynamicSharedAttribute = 8;   // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES

// The device's own context, current while this lives; torch works in the same.
class Inside {
 public:
  Inside(const Driver& driver, void* context, int device) : driver_(driver) {
    int current = -1;
    if (driver.current_device(&current) == 0 && current == device) return;
    driver.check(driver.push_context(context), "cuCtxPushCurrent");
    pushed_ = true;
  }
  ~Inside() {
    void* context = nullptr;
    if (pushed_) driver_.pop_context(&context);
  }
  Inside(const Inside&) = delete;
  Inside& operator=(const Inside&) = delete;

 private:
  const Driver& driver_;
  bool pushed_ = false;
};

}  // namespace

Driver::Driver(const std::string& library) : library_(dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL)) {
  if (!library_) throw std::runtime_error(std::string("the CUDA driver can't be loaded: ") + dlerror());
  try {
    find(init, "cuInit");
    find(error_string, "cuGetErrorString");
    find(current_device, "cuCtxGetDevice");
    find(retain_context, "cuDevicePrimaryCtxRetain");
    find(push_context, "cuCtxPushCurrent_v2");
    find(pop_context, "cuCtxPopCurrent_v2");
    find(load_module, "cuModuleLoadData");
    find(get_function, "cuModuleGetFunction");
    find(set_attribute, "cuFuncSetAttribute");
    find(launch_kernel, "cuLaunchKernel");
    check(init(0), "cuInit");
  } catch (...) {
    dlclose(library_);
    throw;
  }
}

Driver::~Driver() { dlclose(library_); }

template <class Function>
void Driver::find(Function*& function, const char* name) {
  void* found = dlsym(library_, name);
  if (!found) throw std::runtime_error(std::string("the CUDA driver is too old: it has no ") + name);
  function = reinterpret_cast<Function*>(found);
}

void Driver::check(int result, const char* function) const {
  if (result == 0) return;
  const char* text = nullptr;
  error_string(result, &text);
  throw std::runtime_error(std::string(function) + ": " + (text ? text : "error " + std::to_string(result)));
}

Kernel::Kernel(std::shared_ptr<Driver> driver, const std::string& image, const std::string& name, int device,
               unsigned threads, unsigned shared)
    : driver_(std::move(driver)), device_(device), threads_(threads), shared_(shared) {
  driver_->check(driver_->retain_context(&context_, device), "cuDevicePrimaryCtxRetain");
  const Inside inside(*driver_, context_, device);
  void* module = nullptr;
  driver_->check(driver_->load_module(&module, image.data()), "cuModuleLoadData");
  driver_->check(driver_->get_function(&function_, module, name.c_str()), "cuModuleGetFunction");
  if (shared > kPlainShared) {
    driver_->check(driver_->set_attribute(function_, kDynamicSharedAttribute, static_cast<int>(shared)),
                   "cuFuncSetAttribute");
  }
}

void Kernel::launch(unsigned programs, unsigned members, std::uintptr_t stream,
                    std::vector<Argument>& arguments) const {
  std::uint64_t scratch = 0;
  std::vector<void*> places;
  places.reserve(arguments.size() + 2);
  for (Argument& argument : arguments) places.push_back(&argument);
  places.insert(places.end(), 2, &scratch);
  const Inside inside(*driver_, context_, device_);
  driver_->check(driver_->launch_kernel(function_, programs, members, 1, threads_, 1, 1, shared_,
                                        reinterpret_cast<void*>(stream), places.data(), nullptr),
                 "cuLaunchKernel");
}

}  // namespace llmdpd::cuda

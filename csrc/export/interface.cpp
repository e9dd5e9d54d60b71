// The C interface: no exception leaves it.
#include <cstdio>
#include <new>

#include "exported.h"
#include "instruction_set.h"
#include "llmdpd_policy.h"

struct llmdpd_policy {
  llmdpd::Exported exported;
};

namespace llmdpd {
namespace {

char* last_message() {
  static thread_local char message[512] = "";
  return message;
}

int fail(int code, const char* message) {
  std::snprintf(last_message(), 512, "%s", message);
  return code;
}

template <class Body>
int guarded(bool given, const Body& body) {
  if (!given) return fail(LLMDPD_ARGUMENT, "a null pointer");
  try {
    body();
    return LLMDPD_OK;
  } catch (const Failure& failure) {
    return fail(failure.code, failure.what());
  } catch (const std::bad_alloc&) {
    return fail(LLMDPD_MEMORY, "no memory");
  } catch (const std::exception& error) {
    return fail(LLMDPD_INTERNAL, error.what());
  } catch (...) {
    return fail(LLMDPD_INTERNAL, "an unknown fault");
  }
}

}  // namespace
}  // namespace llmdpd

using llmdpd::File;
using llmdpd::FileKind;
using llmdpd::guarded;

int llmdpd_create_from_memory(const void* bytes, size_t size, llmdpd_policy** policy) {
  if (policy) *policy = nullptr;
  return guarded(bytes && policy, [&] {
    *policy = new llmdpd_policy{llmdpd::Exported(File(bytes, size, FileKind::kPolicy))};
  });
}

int llmdpd_create(const char* path, llmdpd_policy** policy) {
  if (policy) *policy = nullptr;
  return guarded(path && policy, [&] {
    const std::vector<unsigned char> bytes = llmdpd::read_bytes(path);
    *policy = new llmdpd_policy{llmdpd::Exported(File(bytes.data(), bytes.size(), FileKind::kPolicy))};
  });
}

void llmdpd_destroy(llmdpd_policy* policy) { delete policy; }

int llmdpd_set_prompt_from_memory(llmdpd_policy* policy, const void* bytes, size_t size) {
  return guarded(policy && bytes, [&] { policy->exported.set_prompt(File(bytes, size, FileKind::kPrompt)); });
}

int llmdpd_set_prompt(llmdpd_policy* policy, const char* path) {
  return guarded(policy && path, [&] {
    const std::vector<unsigned char> bytes = llmdpd::read_bytes(path);
    policy->exported.set_prompt(File(bytes.data(), bytes.size(), FileKind::kPrompt));
  });
}

int llmdpd_seed(llmdpd_policy* policy, uint64_t seed) {
  return guarded(policy, [&] { policy->exported.seed(seed); });
}

int llmdpd_reset(llmdpd_policy* policy) {
  return guarded(policy, [&] { policy->exported.reset(); });
}

int llmdpd_reset_row(llmdpd_policy* policy, size_t row) {
  return guarded(policy, [&] { policy->exported.reset_row(row); });
}

int llmdpd_set_step(llmdpd_policy* policy, size_t row, int64_t step) {
  return guarded(policy, [&] { policy->exported.set_step(row, step); });
}

int llmdpd_act(llmdpd_policy* policy, const float* observations, size_t rows, float* actions) {
  return guarded(policy && ((observations && actions) || rows == 0),
                 [&] { policy->exported.act(observations, rows, actions); });
}

size_t llmdpd_observation_size(const llmdpd_policy* policy) { return policy ? policy->exported.observed_dim() : 0; }

size_t llmdpd_action_size(const llmdpd_policy* policy) { return policy ? policy->exported.action_dim() : 0; }

const char* llmdpd_instruction_set(void) { return llmdpd::best_instruction_set().name; }

const char* llmdpd_message(void) { return llmdpd::last_message(); }

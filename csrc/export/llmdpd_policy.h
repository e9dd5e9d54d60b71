/* An exported policy: one folded prompt, observations in, actions out. C, and C++.
 *
 *   llmdpd_policy* policy;
 *   if (llmdpd_create("policy.llmdpd", &policy) || llmdpd_set_prompt(policy, "prompts/push-v3.llmdpd")) {
 *     fprintf(stderr, "%s\n", llmdpd_message());
 *   }
 *   llmdpd_reset(policy);                                // at every episode's start
 *   llmdpd_act(policy, observation, 1, action);          // at every time step
 *   llmdpd_destroy(policy);
 *
 * Functions that can fail return 0 (LLMDPD_OK) or an error code; `llmdpd_message` then says what is wrong. No function
 * throws, prints or ends the process. After an error the policy is as it was before the call.
 *
 * Threads: a policy may be used by one thread at a time, and by different threads one after another. Different policies
 * share nothing. A call computes on the calling thread alone. `llmdpd_act` allocates no
 * memory after the first call by the same thread, with as many rows and the same prompt or a shorter one.
 */
#ifndef LLMDPD_POLICY_H
#define LLMDPD_POLICY_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define LLMDPD_API __attribute__((visibility("default")))
#else
#define LLMDPD_API
#endif

enum {
  LLMDPD_OK = 0,
  LLMDPD_ARGUMENT = 1,  /* a null pointer, or a number out of range */
  LLMDPD_FILE = 2,      /* a file that cannot be read */
  LLMDPD_FORMAT = 3,    /* a file of another format or version, or a damaged one */
  LLMDPD_MISMATCH = 4,  /* a prompt of another policy */
  LLMDPD_NO_PROMPT = 5, /* acting before a prompt was set */
  LLMDPD_NUMBER = 6,    /* NaN or Inf in an observation or in the action */
  LLMDPD_MEMORY = 7,    /* no memory */
  LLMDPD_INTERNAL = 8   /* a fault of this library */
};

typedef struct llmdpd_policy llmdpd_policy;

/* A policy from its file, without a prompt and with seed 0. On an error *policy is null. */
LLMDPD_API int llmdpd_create(const char* path, llmdpd_policy** policy);
/* The same from a file's bytes, which are copied. */
LLMDPD_API int llmdpd_create_from_memory(const void* bytes, size_t size, llmdpd_policy** policy);
/* Nothing for a null pointer. */
LLMDPD_API void llmdpd_destroy(llmdpd_policy* policy);

/* Takes a prompt that was exported with this policy. Every row begins a new episode; the noise goes on. */
LLMDPD_API int llmdpd_set_prompt(llmdpd_policy* policy, const char* path);
LLMDPD_API int llmdpd_set_prompt_from_memory(llmdpd_policy* policy, const void* bytes, size_t size);

/* Fixes the noise of all actions from here on: as `Policy.seed` in Python, with the same actions. */
LLMDPD_API int llmdpd_seed(llmdpd_policy* policy, uint64_t seed);
/* Begins a new episode in every row, or in one: its time step is 0 again. */
LLMDPD_API int llmdpd_reset(llmdpd_policy* policy);
LLMDPD_API int llmdpd_reset_row(llmdpd_policy* policy, size_t row);
/* Sets the time step at which a row goes on; by itself it counts from 0. */
LLMDPD_API int llmdpd_set_step(llmdpd_policy* policy, size_t row, int64_t step);

/* Observations [rows, llmdpd_observation_size] to actions [rows, llmdpd_action_size]. Row i is the same episode from
 * call to call. The numbers of a Dict observation are those of its keys, in the order of `observation_keys` in
 * export.json, each with how many it has. Where `track_after` there is above 0, the tracker of the demonstration acts
 * in rows in which the policy does not get on, as in `Policy.act` of Python: act once at every time step. */
LLMDPD_API int llmdpd_act(llmdpd_policy* policy, const float* observations, size_t rows, float* actions);

/* Numbers of an observation, and of an action; 0 for a null pointer. */
LLMDPD_API size_t llmdpd_observation_size(const llmdpd_policy* policy);
LLMDPD_API size_t llmdpd_action_size(const llmdpd_policy* policy);
/* The instruction set that is used here: "avx512", "avx2" or "plain". */
LLMDPD_API const char* llmdpd_instruction_set(void);
/* What went wrong in this thread's last call that returned an error. */
LLMDPD_API const char* llmdpd_message(void);

#ifdef __cplusplus
}
#endif

#endif

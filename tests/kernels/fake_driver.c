/* A stand-in for the CUDA driver's library: loads nothing, and records what is launched. */
#include <stdint.h>
#include <string.h>

#define API __attribute__((visibility("default")))
enum { LAUNCHES = 4096, ARGUMENTS = 64, MODULES = 512 };

/* A launch: kernel, grid (2), threads, shared, stream, device, number of arguments, then the 8 bytes of each. */
API uint64_t fake_launches[LAUNCHES][8 + ARGUMENTS];
API int fake_count, fake_current = -1, fake_contexts, fake_shared, fake_result;
API char fake_names[MODULES][64];
API int fake_kernels;

API int cuInit(unsigned flags) { return (int)flags; }
API int cuGetErrorString(int result, const char** text) {
  *text = result == 700 ? "an illegal memory access was encountered" : "another error";
  return 0;
}
API int cuCtxGetDevice(int* device) {
  *device = fake_current;
  return fake_current < 0 ? 201 : 0;
}
API int cuDevicePrimaryCtxRetain(void** context, int device) {
  *context = (void*)(intptr_t)(device + 1);
  return 0;
}
static int pushed[16], depth;
API int cuCtxPushCurrent_v2(void* context) {
  pushed[depth++] = fake_current;
  fake_current = (int)(intptr_t)context - 1;
  fake_contexts++;
  return 0;
}
API int cuCtxPopCurrent_v2(void** context) {
  *context = (void*)(intptr_t)(fake_current + 1);
  fake_current = pushed[--depth];
  return 0;
}
API int cuModuleLoadData(void** module, const void* image) {
  if (memcmp(image, "\177ELF", 4)) return 200;
  *module = (void*)image;
  return 0;
}
API int cuModuleGetFunction(void** function, void* module, const char* name) {
  (void)module;
  if (fake_kernels >= MODULES) return 2;
  strncpy(fake_names[fake_kernels], name, 63);
  *function = (void*)(intptr_t)(++fake_kernels);
  return 0;
}
API int cuFuncSetAttribute(void* function, int attribute, int value) {
  (void)function;
  if (attribute == 8) fake_shared = value;
  return 0;
}
API int cuLaunchKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                       unsigned block_y, unsigned block_z, unsigned shared, void* stream, void** parameters,
                       void** extra) {
  if (fake_result || grid_z != 1 || block_y != 1 || block_z != 1 || extra) return fake_result ? fake_result : 1;
  const int kernel = (int)(intptr_t)function - 1;
  uint64_t* record = fake_launches[fake_count++ % LAUNCHES];
  const uint64_t plain[8] = {(uint64_t)kernel, grid_x, grid_y, block_x, shared, (uint64_t)stream, (uint64_t)fake_current, 0};
  memcpy(record, plain, sizeof plain);
  /* Behind the last are triton's two scratch memories, at one and the same place. */
  int count = 0;
  for (; parameters[count] != parameters[count + 1]; ++count) {
    if (count == ARGUMENTS) return 2;
    memcpy(&record[8 + count], parameters[count], 8);
  }
  record[7] = (uint64_t)count;
  return *(uint64_t*)parameters[count] ? 3 : 0;
}

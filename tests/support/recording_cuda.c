// A libcuda.so.1 without a GPU: it has what Triton's launcher calls, launches nothing, and keeps the grid, the stream and the
// arguments of every launch. How many bytes each argument has is read from the compiled kernel, as the driver reads it.

#include "cuda.h"
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_PARAMETERS = 128, MOST_BYTES = 8 };

typedef struct {
  char name[256];
  int parameters;
  int size[MOST_PARAMETERS];
} Kernel;

typedef struct {
  const Kernel* kernel;
  unsigned grid[3], threads, shared;
  uint64_t stream;
  unsigned char value[MOST_PARAMETERS][MOST_BYTES];
} Launch;

static Launch* launches;
static int count;

int recorded_launches(void) { return count; }
const char* recorded_name(int i) { return launches[i].kernel->name; }
int recorded_parameters(int i) { return launches[i].kernel->parameters; }

void recorded_shape(int i, uint64_t* shape) {
  for (int axis = 0; axis < 3; ++axis) shape[axis] = launches[i].grid[axis];
  shape[3] = launches[i].threads;
  shape[4] = launches[i].stream;
}

int recorded_value(int i, int parameter, unsigned char* bytes) {
  memcpy(bytes, launches[i].value[parameter], MOST_BYTES);
  return launches[i].kernel->size[parameter];
}

// The sizes of a kernel's parameters, from the section .nv.info.<kernel> of its cubin, an ELF file of 64 bits. An entry is a
// format, an attribute and two bytes, which are a length where the format is 4; attribute 0x17 describes a parameter: its
// ordinal in bytes 4 and 5, its size in the 14 bits above the 18th of bytes 8 to 11.
static int read_parameters(Kernel* kernel, const unsigned char* cubin) {
  uint64_t table;
  uint16_t entry, sections, names_index;
  memcpy(&table, cubin + 0x28, 8);
  memcpy(&entry, cubin + 0x3A, 2);
  memcpy(&sections, cubin + 0x3C, 2);
  memcpy(&names_index, cubin + 0x3E, 2);
  uint64_t names;
  memcpy(&names, cubin + table + names_index * entry + 0x18, 8);
  char wanted[300] = ".nv.info.";
  strcat(wanted, kernel->name);
  for (int i = 0; i < sections; ++i) {
    const unsigned char* section = cubin + table + i * entry;
    uint32_t name;
    uint64_t offset, length;
    memcpy(&name, section, 4);
    memcpy(&offset, section + 0x18, 8);
    memcpy(&length, section + 0x20, 8);
    if (strcmp((const char*)cubin + names + name, wanted)) continue;
    for (uint64_t at = offset; at + 4 <= offset + length;) {
      uint16_t bytes;
      memcpy(&bytes, cubin + at + 2, 2);
      if (cubin[at] == 4 && cubin[at + 1] == 0x17) {
        uint16_t ordinal;
        uint32_t flags;
        memcpy(&ordinal, cubin + at + 4 + 4, 2);
        memcpy(&flags, cubin + at + 4 + 8, 4);
        int size = flags >> 18 & 0x3FFF;
        if (ordinal >= MOST_PARAMETERS || size > MOST_BYTES) return 0;
        kernel->size[ordinal] = size;
        if (ordinal >= kernel->parameters) kernel->parameters = ordinal + 1;
      }
      at += 4 + (cubin[at] == 4 ? bytes : 0);
    }
    return kernel->parameters > 0;
  }
  return 0;
}

CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int* version) { return *version = 13000, CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int* number) { return *number = 1, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice* device, int ordinal) { return *device = ordinal, CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) { return *context = (CUcontext)1, CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext* context) { return *context = (CUcontext)1, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice* device) { return *device = 0, CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t* value, CUlimit limit) { return *value = 0, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult error, const char** text) { return *text = "refused by the recording libcuda", CUDA_SUCCESS; }
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute attribute, int value) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction f) {
  return *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0, CUDA_SUCCESS;
}
CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus* status) {
  return *status = CU_STREAM_CAPTURE_STATUS_NONE, CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void* data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  return memcpy(data, &pointer, sizeof pointer), CUDA_SUCCESS;
}
CUresult cuOccupancyMaxActiveClusters(int* clusters, CUfunction f, const CUlaunchConfig* config) {
  return CUDA_ERROR_NOT_SUPPORTED;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: return *value = 9, CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: return *value = 0, CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: return *value = 32, CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: return *value = 227 * 1024, CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: return *value = 65536, CUDA_SUCCESS;
    default: return *value = 1, CUDA_SUCCESS;
  }
}

CUresult cuModuleLoadData(CUmodule* module, const void* image) {  // asked for a function before the image can go
  return *module = (CUmodule)image, CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction* f, CUmodule module, const char* name) {
  Kernel* kernel = calloc(1, sizeof(Kernel));
  strncpy(kernel->name, name, sizeof kernel->name - 1);
  if (!read_parameters(kernel, (const unsigned char*)module)) return CUDA_ERROR_INVALID_IMAGE;
  return *f = (CUfunction)kernel, CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction f, void** parameters, void** extra) {
  launches = realloc(launches, (count + 1) * sizeof(Launch));
  Launch* launch = &launches[count++];
  memset(launch, 0, sizeof *launch);
  launch->kernel = (const Kernel*)f;
  launch->grid[0] = config->gridDimX;
  launch->grid[1] = config->gridDimY;
  launch->grid[2] = config->gridDimZ;
  launch->threads = config->blockDimX * config->blockDimY * config->blockDimZ;
  launch->shared = config->sharedMemBytes;
  launch->stream = (uint64_t)config->hStream;
  for (int i = 0; i < launch->kernel->parameters; ++i) memcpy(launch->value[i], parameters[i], launch->kernel->size[i]);
  return CUDA_SUCCESS;
}

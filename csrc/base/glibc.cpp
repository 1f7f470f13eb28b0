// libstdc++ asks glibc 2.32 and later whether the process has one thread, to count references without atomics. This answers no,
// so that an extension built against a newer glibc loads beside an older one, as torch's own wheels do.

#ifdef __gnu_linux__
extern "C" __attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
#endif

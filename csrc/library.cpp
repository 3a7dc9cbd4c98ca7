// What this library was built for. Python reads the texts from the file when the library cannot be loaded.
#include <torch/headeronly/version.h>

extern "C" __attribute__((visibility("default"), used)) const char adamae_fast_built_for[] =
    "adamae_fast built for torch " TORCH_VERSION;

#ifdef __AVX2__
extern "C" __attribute__((visibility("default"), used)) const char adamae_fast_processor[] = "adamae_fast needs AVX2";
#endif

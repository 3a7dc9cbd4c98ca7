// Which torch this library was built for. Python reads the text from the file when the library does not load.
#include <torch/headeronly/version.h>

extern "C" __attribute__((visibility("default"), used)) const char adamae_fast_built_for[] =
    "adamae_fast built for torch " TORCH_VERSION;

#ifdef __AVX2__
extern "C" __attribute__((visibility("default"), used)) const char adamae_fast_processor[] = "needs AVX2";
#endif

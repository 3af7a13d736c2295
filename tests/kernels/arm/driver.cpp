// This program runs the compiled kernels for another process, which tests them on an emulated processor. It reads calls
// from its standard input and writes the results to its standard output. `emulator.py` is the other side, and describes
// the bytes.
#include <dlfcn.h>
#include <fcntl.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

namespace {

// Reads `size` bytes, or ends the program if there are no more calls.
void read_bytes(void* out, size_t size) {
    if (fread(out, 1, size, stdin) != size) exit(0);
}

template <class T>
T take() {
    T value;
    read_bytes(&value, sizeof(value));
    return value;
}

// Memory of the caller, and an address in it.
struct Buffer {
    char* data;
    uint64_t size;
};
using Buffers = std::vector<Buffer>;

char* take_address(const Buffers& buffers) {
    const auto buffer = take<uint32_t>();
    return buffers[buffer].data + take<uint64_t>();
}

Buffers take_buffers() {
    Buffers buffers(take<uint32_t>());
    for (Buffer& buffer : buffers) {
        constexpr uint64_t LINE = 64;
        buffer.size = take<uint64_t>();
        buffer.data = static_cast<char*>(aligned_alloc(LINE, (buffer.size / LINE + 1) * LINE));
        read_bytes(buffer.data, buffer.size);
    }
    for (auto left = take<uint32_t>(); left > 0; left--) {  // the pointers that lie in the buffers themselves
        char* const place = take_address(buffers);
        *reinterpret_cast<char**>(place) = take_address(buffers);
    }
    return buffers;
}

constexpr int MOST_ARGUMENTS = 32;
struct Arguments {
    int64_t whole[MOST_ARGUMENTS] = {};
    float number = 0;
};

Arguments take_arguments(const Buffers& buffers) {
    Arguments arguments;
    const auto count = take<uint32_t>();
    for (uint32_t i = 0; i < count; i++) {
        switch (take<char>()) {
            case 'i': arguments.whole[i] = take<int64_t>(); break;
            case 'p': arguments.whole[i] = reinterpret_cast<int64_t>(take_address(buffers)); break;
            case 'n': arguments.number = take<float>(); break;
            case 'd': {  // a file that the other process has opened
                const std::string path = "/proc/" + std::to_string(getppid()) + "/fd/" + std::to_string(take<int64_t>());
                arguments.whole[i] = open(path.c_str(), O_RDONLY);
                break;
            }
            default: exit(2);
        }
    }
    return arguments;
}

// Calls a function with all its arguments. By the calling convention of ARM, a function takes no notice of the ones that
// it does not have, and a number that is not whole has registers of its own.
template <size_t... I>
int64_t call(void* function, const Arguments& a, std::index_sequence<I...>) {
    using Function = int64_t (*)(decltype(int64_t(I))..., float);
    return reinterpret_cast<Function>(function)(a.whole[I]..., a.number);
}

}  // namespace

int main() {
    for (;;) {
        std::string name(take<uint32_t>(), ' ');
        read_bytes(&name[0], name.size());
        const Buffers buffers = take_buffers();
        const Arguments arguments = take_arguments(buffers);
        void* const function = dlsym(RTLD_DEFAULT, name.c_str());
        const int64_t is_known = function != nullptr;
        const int64_t result = is_known ? call(function, arguments, std::make_index_sequence<MOST_ARGUMENTS>{}) : 0;
        fwrite(&is_known, sizeof(is_known), 1, stdout);
        fwrite(&result, sizeof(result), 1, stdout);
        for (const Buffer& buffer : buffers) {
            fwrite(buffer.data, 1, buffer.size, stdout);
            free(buffer.data);
        }
        fflush(stdout);
    }
}

// Memory that kernels work in.
#pragma once

#include <cstdint>
#include <cstring>
#include <new>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace perfkit {

using i64 = std::int64_t;

// What a thread gave back last: its next call asks for the same sizes again, and to get them from the system takes a
// twentieth of a short sequence's time. Not the large ones; and none under a sanitizer, which is to see each end.
class Returned {
  public:
    static constexpr i64 LARGEST = 1 << 17;  // bytes

    ~Returned() {
        for (const Block& block : blocks_) ::operator delete(block.at, LINE);
    }
    void* take(i64 bytes) {
        for (Block& block : blocks_)
            if (block.bytes == bytes) return block.bytes = 0, std::exchange(block.at, nullptr);
        return ::operator new(bytes, LINE);
    }
    void give(void* at, i64 bytes) {
        if (KEEPS && bytes <= LARGEST) at = std::exchange(blocks_[next_++ % MOST], Block{at, bytes}).at;
        ::operator delete(at, LINE);
    }

  private:
    static constexpr std::align_val_t LINE{64};
    static constexpr unsigned MOST = 16;
#if defined(__SANITIZE_ADDRESS__)
    static constexpr bool KEEPS = false;
#else
    static constexpr bool KEEPS = true;
#endif
    struct Block {
        void* at = nullptr;
        i64 bytes = 0;
    };
    Block blocks_[MOST];
    unsigned next_ = 0;
};
inline thread_local Returned returned;

// Memory that begins at a cache line and holds anything at first. Throws std::bad_alloc.
template <class T>
class Array {
  public:
    Array() = default;
    explicit Array(i64 count) { allocate(count); }
    Array(Array&& other) noexcept : data_(std::exchange(other.data_, nullptr)), bytes_(other.bytes_) {}
    Array(const Array&) = delete;
    Array& operator=(const Array&) = delete;
    ~Array() { release(); }

    void allocate(i64 count) {
        release();
        bytes_ = count * i64(sizeof(T)) + 64;
        data_ = static_cast<T*>(returned.take(bytes_));
    }
    void allocate_zeros(i64 count) {
        allocate(count);
        std::memset(static_cast<void*>(data_), 0, count * sizeof(T));
    }
    T* data() const { return data_; }
    T& operator[](i64 i) const { return data_[i]; }

  private:
    void release() {
        if (data_) returned.give(data_, bytes_);
        data_ = nullptr;
    }
    T* data_ = nullptr;
    i64 bytes_ = 0;
};

// What is saved for the backward pass is new memory in each call, and giving it in pages of 4 KB costs the system as
// much time as computing what is written there.
inline void ask_for_large_pages(void* data, i64 bytes) {
#if defined(MADV_HUGEPAGE)
    constexpr std::uintptr_t PAGE = 1 << 21;
    const auto from = (reinterpret_cast<std::uintptr_t>(data) + PAGE - 1) / PAGE * PAGE;
    const auto to = (reinterpret_cast<std::uintptr_t>(data) + bytes) / PAGE * PAGE;
    if (to > from) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);  // advice: it may be refused
#else
    (void)data, (void)bytes;
#endif
}

}  // namespace perfkit

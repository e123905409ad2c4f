// torch's allocator of CPU memory with a cache before it, which serves threads that are within calls that keep memory:
// what they free waits for the next one of them. All else is the allocator's that was there before.
//
// Each piece of memory has its own deleter, so either side's may be freed anywhere and at any time.
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <pthread.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <mutex>
#include <unordered_map>

namespace {

constexpr std::size_t LEAST = 1 << 20;  // bytes of a piece: smaller ones the C library keeps itself
constexpr std::size_t WASTE = 2;        // a piece serves what needs no less than this part of it
constexpr std::size_t MOST = 2;         // times what was in use at once are held at most

thread_local int depth = 0;  // of calls that keep memory

class Keeper final : public c10::Allocator {
  public:
    c10::Allocator* const base = c10::GetCPUAllocator();
    std::mutex lock;

    c10::DataPtr allocate(std::size_t size) override {
        // A profiler wants to be told of each piece, as the allocator behind does.
        if (!depth || size < LEAST || c10::memoryProfilingEnabled()) return base->allocate(size);
        void* const at = take(size);
        return {at, at, &release, c10::Device(c10::DeviceType::CPU)};
    }
    c10::DeleterFnPtr raw_deleter() const override { return &release; }
    void copy_data(void* to, const void* from, std::size_t size) const override { base->copy_data(to, from, size); }

    void count_users(int change) {
        const std::lock_guard<std::mutex> locked(lock);
        users_ += change;
        if (users_ == 0) drop_all(), most_ = in_use_;
    }
    void drop() {
        const std::lock_guard<std::mutex> locked(lock);
        drop_all();
    }
    std::size_t held() {
        const std::lock_guard<std::mutex> locked(lock);
        return held_;
    }

  private:
    struct Free {
        void* at;
        std::uint64_t since;
    };
    std::multimap<std::size_t, Free> free_;           // by size
    std::unordered_map<void*, std::size_t> in_use_of_;  // sizes
    std::size_t held_ = 0, in_use_ = 0, most_ = 0;    // bytes: free, in use, and in use at once so far
    std::uint64_t clock_ = 0;
    int users_ = 0;

    static void release(void* at);

    void* take(std::size_t size) {
        const std::lock_guard<std::mutex> locked(lock);
        void* at;
        if (const auto found = free_.lower_bound(size); found != free_.end() && found->first / WASTE <= size) {
            size = found->first, at = found->second.at;
            held_ -= size, free_.erase(found);
        } else {
            at = anew(size);
        }
        in_use_of_.emplace(at, size);
        most_ = std::max(most_, in_use_ += size);
        return at;
    }

    void* anew(std::size_t size) {
        try {
            return base->raw_allocate(size);
        } catch (...) {  // there may be enough without what waits here
            if (free_.empty()) throw;
        }
        drop_all();
        return base->raw_allocate(size);
    }

    // False if it is none of those taken here.
    bool give(void* at) {
        const std::lock_guard<std::mutex> locked(lock);
        const auto found = in_use_of_.find(at);
        if (found == in_use_of_.end()) return false;
        const std::size_t size = found->second;
        in_use_of_.erase(found), in_use_ -= size;
        free_.emplace(size, Free{at, clock_++}), held_ += size;
        while (held_ && (!users_ || held_ + in_use_ > MOST * most_))
            drop_one(std::min_element(free_.begin(), free_.end(), [](const auto& one, const auto& other) {
                return one.second.since < other.second.since;
            }));
        return true;
    }

    void drop_one(std::multimap<std::size_t, Free>::iterator each) {
        held_ -= each->first;
        base->raw_deallocate(each->second.at);
        free_.erase(each);
    }
    void drop_all() {
        while (!free_.empty()) drop_one(free_.begin());
    }
};

// Never destroyed: tensors may be freed until the process ends.
Keeper* keeper = nullptr;

void Keeper::release(void* at) {
    if (!keeper->give(at)) keeper->base->raw_deallocate(at);
}

}  // namespace

// Put the cache before torch's allocator. Returns whether torch takes it.
extern "C" int perfkit_memory_install() {
    if (keeper) return c10::GetCPUAllocator() == keeper;
    Keeper* const made = new Keeper;
    if (!made->base->raw_deleter()) return 0;
    keeper = made;
    // A child finds nobody in the middle of anything.
    pthread_atfork([] { keeper->lock.lock(); }, [] { keeper->lock.unlock(); }, [] { keeper->lock.unlock(); });
    c10::SetCPUAllocator(keeper);
    return c10::GetCPUAllocator() == keeper;
}

extern "C" void perfkit_memory_within(int change) { depth += change; }

// Memory is kept for as long as there are users.
extern "C" void perfkit_memory_users(int change) { keeper->count_users(change); }

extern "C" void perfkit_memory_drop() { keeper->drop(); }

extern "C" std::int64_t perfkit_memory_held() { return std::int64_t(keeper->held()); }

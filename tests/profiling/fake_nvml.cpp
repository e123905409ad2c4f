// A stand-in for libnvidia-ml.so: enough of it to run everything that perfkit asks, on cards that do not exist.
//
// Which cards is said by $FAKE_NVML, read by nvmlInitWithFlags, as words:
//   cards=2            how many
//   mig=1              card 0 is divided into so many parts
//   refuse=NAME:CODE   this function returns that nvmlReturn_t (may be given several times)
//   power=MILLIWATTS   until fake_power changes it
//   tick=US            how often the energy counter moves; 0: never
//   reasons=BITS       why the clock is held down
// Built with -DOLD_DRIVER it lacks what drivers before 535 lack.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <map>
#include <sstream>
#include <string>

namespace {

enum { SUCCESS = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7 };

struct Device {
    int card, part;  // part -1: the whole card
};

struct State {
    int started = 0, cards = 1, parts = 0;
    double milliwatts = 100e3, millijoules = 5e6, since = 0, read_s = 0;
    long tick_us = 2000;
    unsigned long long reasons = 0;
    std::map<std::string, int> refused;
} state;

Device devices[16][8];

double now_us() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1e6 + time.tv_nsec / 1e3;
}

void read_environment() {
    int started = state.started;
    state = State();
    state.started = started;
    state.since = now_us();
    std::istringstream words(getenv("FAKE_NVML") ? getenv("FAKE_NVML") : "");
    for (std::string word; words >> word;) {
        auto name = word.substr(0, word.find('=')), value = word.substr(word.find('=') + 1);
        if (name == "cards") state.cards = atoi(value.c_str());
        if (name == "mig") state.parts = atoi(value.c_str());
        if (name == "power") state.milliwatts = atof(value.c_str());
        if (name == "tick") state.tick_us = atol(value.c_str());
        if (name == "reasons") state.reasons = strtoull(value.c_str(), nullptr, 0);
        auto colon = value.find(':');
        if (name == "refuse") state.refused[value.substr(0, colon)] = atoi(value.substr(colon + 1).c_str());
    }
    for (int card = 0; card < 16; ++card)
        for (int part = 0; part < 8; ++part) devices[card][part] = {card, part - 1};
}

int refusal(const char* function) {
    if (!state.started) return UNINITIALIZED;
    auto found = state.refused.find(function);
    return found == state.refused.end() ? SUCCESS : found->second;
}

void write(char* text, unsigned length, const std::string& value) { snprintf(text, length, "%s", value.c_str()); }

struct Memory { unsigned long long total, free, used; };
struct Utilization { unsigned gpu, memory; };
struct Process { unsigned pid; unsigned long long used; unsigned gpu_instance, compute_instance; };
struct Field {
    unsigned id, scope;
    int64_t timestamp, latency;
    int type, result;
    union { double d; unsigned ui; unsigned long ul; unsigned long long ull; } value;
};

}  // namespace

#define OR_REFUSED if (int code = refusal(__func__)) return code
#define WHOLE_CARD(device) if ((device)->part >= 0) return NOT_SUPPORTED
// A function that answers with one value, of any device or of whole cards alone; `kind` is its middle argument, if any.
#define ANSWER(name, type, value) int name(Device*, type* out) { OR_REFUSED; *out = value; return SUCCESS; }
#define KIND_ANSWER(name, type, value) \
    int name(Device*, int kind, type* out) { OR_REFUSED; *out = value; return SUCCESS; }
#define CARD_ANSWER(name, type, value) \
    int name(Device* device, type* out) { OR_REFUSED; WHOLE_CARD(device); *out = value; return SUCCESS; }

extern "C" {

void fake_power(double milliwatts) {
    double now = now_us();
    state.millijoules += state.milliwatts * (now - state.since) / 1e6;
    state.since = now;
    state.milliwatts = milliwatts;
}

// The time that the energy counter showed when it was last read.
double fake_seconds() { return state.read_s; }

int nvmlInitWithFlags(unsigned) {
    read_environment();
    if (auto code = state.refused.find(__func__); code != state.refused.end()) return code->second;
    ++state.started;
    return SUCCESS;
}
int nvmlShutdown() {
    OR_REFUSED;
    --state.started;
    return SUCCESS;
}
const char* nvmlErrorString(int) { return "fake"; }
int nvmlSystemGetDriverVersion(char* text, unsigned length) {
    OR_REFUSED;
    write(text, length, "570.00");
    return SUCCESS;
}
int nvmlSystemGetProcessName(unsigned pid, char* text, unsigned length) {
    OR_REFUSED;
    write(text, length, pid == 4242 ? "/usr/bin/another" : "");
    return pid == 4242 ? SUCCESS : NOT_FOUND;
}
int nvmlDeviceGetCount_v2(unsigned* count) {
    OR_REFUSED;
    *count = state.cards;
    return SUCCESS;
}
int nvmlDeviceGetHandleByIndex_v2(unsigned index, Device** device) {
    OR_REFUSED;
    if (index >= (unsigned)state.cards) return INVALID_ARGUMENT;
    *device = &devices[index][0];
    return SUCCESS;
}
int nvmlDeviceGetUUID(Device* device, char* text, unsigned length) {
    OR_REFUSED;
    auto card = std::to_string(device->card);
    write(text, length, device->part < 0 ? "GPU-" + card : "MIG-" + card + "-" + std::to_string(device->part));
    return SUCCESS;
}
int nvmlDeviceGetName(Device*, char* text, unsigned length) {
    OR_REFUSED;
    write(text, length, "Fake Card");
    return SUCCESS;
}
int nvmlDeviceGetMigMode(Device* device, unsigned* current, unsigned* pending) {
    OR_REFUSED;
    WHOLE_CARD(device);
    *current = *pending = device->card == 0 && state.parts > 0;
    return SUCCESS;
}
int nvmlDeviceGetMaxMigDeviceCount(Device*, unsigned* count) {
    OR_REFUSED;
    *count = 7;
    return SUCCESS;
}
int nvmlDeviceGetMigDeviceHandleByIndex(Device* device, unsigned index, Device** part) {
    OR_REFUSED;
    if (device->card != 0 || index >= (unsigned)state.parts) return NOT_FOUND;
    *part = &devices[0][index + 1];
    return SUCCESS;
}
int nvmlDeviceGetMemoryInfo(Device* device, Memory* memory) {
    OR_REFUSED;
    unsigned long long total = device->part < 0 ? 80ull << 30 : 10ull << 30;
    *memory = {total, total - (1ull << 30), 1ull << 30};
    return SUCCESS;
}
int nvmlDeviceGetCudaComputeCapability(Device*, int* major, int* minor) {
    OR_REFUSED;
    *major = 9;
    *minor = 0;
    return SUCCESS;
}
CARD_ANSWER(nvmlDeviceGetEnforcedPowerLimit, unsigned, 700000)
CARD_ANSWER(nvmlDeviceGetPowerUsage, unsigned, (unsigned)state.milliwatts)
int nvmlDeviceGetTotalEnergyConsumption(Device* device, unsigned long long* energy) {
    OR_REFUSED;
    WHOLE_CARD(device);
    double passed = now_us() - state.since;
    if (state.tick_us) passed = (long long)(passed / state.tick_us) * (double)state.tick_us;
    state.read_s = (state.since + passed) / 1e6;
    *energy = state.tick_us ? state.millijoules + state.milliwatts * passed / 1e6 : state.millijoules;
    return SUCCESS;
}
KIND_ANSWER(nvmlDeviceGetClockInfo, unsigned, kind == 2 ? 2600 : 1900)
KIND_ANSWER(nvmlDeviceGetMaxClockInfo, unsigned, kind == 2 ? 2619 : 1980)
CARD_ANSWER(nvmlDeviceGetUtilizationRates, Utilization, (Utilization{93, 40}))
ANSWER(nvmlDeviceGetCurrPcieLinkGeneration, unsigned, 5)
ANSWER(nvmlDeviceGetCurrPcieLinkWidth, unsigned, 16)
KIND_ANSWER(nvmlDeviceGetPcieThroughput, unsigned, kind ? 2000 : 1000)
ANSWER(nvmlDeviceGetCurrentClocksThrottleReasons, unsigned long long, state.reasons)
int nvmlDeviceGetTemperature(Device* device, int, unsigned* degrees) {
    OR_REFUSED;
    WHOLE_CARD(device);
    *degrees = 54;
    return SUCCESS;
}
int nvmlDeviceGetEccMode(Device*, int* current, int* pending) {
    OR_REFUSED;
    *current = *pending = 1;
    return SUCCESS;
}
int nvmlDeviceGetTotalEccErrors(Device*, int type, int, unsigned long long* count) {
    OR_REFUSED;
    *count = type ? 0 : 3;
    return SUCCESS;
}
#ifndef OLD_DRIVER
ANSWER(nvmlDeviceGetCurrentClocksEventReasons, unsigned long long, state.reasons)
int nvmlDeviceGetComputeRunningProcesses_v3(Device*, unsigned* count, Process* processes) {
    OR_REFUSED;
    if (processes == nullptr || *count < 2) {
        *count = 2;
        return INSUFFICIENT_SIZE;
    }
    processes[0] = {(unsigned)atoi(getenv("FAKE_NVML_OWN_PID") ? getenv("FAKE_NVML_OWN_PID") : "1"), 1ull << 30, 0, 0};
    processes[1] = {4242, 512ull << 20, 0, 0};
    *count = 2;
    return SUCCESS;
}
int nvmlDeviceGetFieldValues(Device* device, int count, Field* fields) {
    OR_REFUSED;
    for (int number = 0; number < count; ++number) {
        fields[number].result = fields[number].id == 186 && device->part < 0 ? SUCCESS : NOT_SUPPORTED;
        fields[number].type = 1;
        fields[number].value.ui = (unsigned)state.milliwatts;
    }
    return SUCCESS;
}
#endif
}

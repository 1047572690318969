// fuzz_profile.c: a damaged profile is refused, or shares out every pair that there is to keep. The
// input is a list of changes to a valid one (fuzz.h).
#include "fuzz.h"

#include "fixture.h"

static Fixture tiny;
static FuzzValid valid;

static void begin(void) {
    CalibrateResult r;
    char made[64];
    size_t bytes;
    snprintf(made, sizeof made, "/tmp/fuzz_profile.%ld", (long)getpid());
    kernels_init(NULL);
    MUST(fixture_open(&tiny, "smol", "smol-q8.kvz", KV_F16, 1));
    MUST(fixture_calibrate(&tiny, made, false, &r) == 0);
    uint8_t *data = (uint8_t *)file_read(made, &bytes, err);
    valid = fuzz_valid(data, bytes);
    unlink(made);
}

static void use(double ratio) {
    enum { HEADS = 256, PAIRS = 100 };
    Profile profile;
    int budget[HEADS];
    if (profile_open(&profile, &tiny.model, valid.file.path, err) != 0) return;
    long sum = 0, heads = profile.n_layers * profile.n_kv_heads;
    MUST(heads <= HEADS && profile_budget(&profile, ratio, PAIRS, budget, err) == 0);
    for (int i = 0; i < heads; i++) {
        MUST(budget[i] >= 0 && budget[i] <= PAIRS);
        sum += budget[i];
    }
    MUST(sum == (long)((double)heads * PAIRS * ratio));
    profile_close(&profile);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    if (!valid.map) begin();
    if (n == 0) return 0;
    fuzz_change(&valid, data + 1, n - 1, false);
    use((1 + data[0] % 100) / 100.0);
    fuzz_change(&valid, data + 1, n - 1, true);
    return 0;
}

/* A preload library that makes an x86 CPU look as if it had AVX2 and nothing above it, to every library of a process.
 *
 *     cc -shared -fPIC -O2 -o cpuid_mask.so cpuid_mask.c -ldl
 *     LD_PRELOAD=./cpuid_mask.so FXQ_CPU=avx2 python ...
 *
 * Libraries find out what a CPU has by the instruction cpuid. Linux can make it fault (arch_prctl(ARCH_SET_CPUID), where
 * the CPU has cpuid_fault); the handler here runs it, clears the bits of what is above AVX2, and goes on behind it.
 * Threads and forked processes inherit the trap, exec ends it and the preload library sets it again. /proc/cpuinfo is
 * not changed. Handlers of SIGSEGV that others install (faulthandler) are kept and called for every other fault.
 *
 * With -DPROBE it is a program that exits with 0 where cpuid shows no AVX512: run under the library it says whether
 * the trap works here.
 */
#define _GNU_SOURCE
#include <cpuid.h>
#include <dlfcn.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#ifdef PROBE
int main(void) {
    unsigned a, b, c, d;
    return !__get_cpuid_count(7, 0, &a, &b, &c, &d) || (b >> 16 & 1);
}
#else

#ifndef ARCH_SET_CPUID
#define ARCH_SET_CPUID 0x1012
#endif
#define BIT(n) (1u << (n))

typedef int (*sigaction_function)(int, const struct sigaction *, struct sigaction *);
static sigaction_function real_sigaction;
static struct sigaction chained;

static long set_cpuid(int allowed) { return syscall(SYS_arch_prctl, ARCH_SET_CPUID, allowed); }

static void mask(uint32_t leaf, uint32_t subleaf, uint32_t *a, uint32_t *b, uint32_t *c, uint32_t *d) {
    if (leaf == 7 && subleaf == 0) {
        /* avx512 f, dq, ifma, pf, er, cd, bw, vl */
        *b &= ~(BIT(16) | BIT(17) | BIT(21) | BIT(26) | BIT(27) | BIT(28) | BIT(30) | BIT(31));
        /* avx512 vbmi, vbmi2, vnni, bitalg, vpopcntdq; gfni stays clear with them */
        *c &= ~(BIT(1) | BIT(6) | BIT(8) | BIT(11) | BIT(12) | BIT(14));
        /* avx512 4vnniw, 4fmaps, vp2intersect, fp16; amx bf16, tile, int8 */
        *d &= ~(BIT(2) | BIT(3) | BIT(8) | BIT(22) | BIT(23) | BIT(24) | BIT(25));
    } else if (leaf == 7 && subleaf == 1) {
        /* avx-vnni, avx512-bf16, amx-fp16, avx-ifma */
        *a &= ~(BIT(4) | BIT(5) | BIT(21) | BIT(23));
        /* avx-vnni-int8, avx-ne-convert, avx-vnni-int16, avx10 */
        *d &= ~(BIT(4) | BIT(5) | BIT(10) | BIT(19));
    } else if (leaf == 0xd && subleaf == 0) {
        *a &= 0x7; /* state that the system saves: x87, SSE, AVX */
    }
}

static void handle(int signal, siginfo_t *info, void *context) {
    greg_t *r = ((ucontext_t *)context)->uc_mcontext.gregs;
    const uint8_t *at = (const uint8_t *)r[REG_RIP];
    if (info->si_code == SI_KERNEL && at[0] == 0x0f && at[1] == 0xa2) {
        uint32_t leaf = r[REG_RAX], subleaf = r[REG_RCX], a, b, c, d;
        set_cpuid(1);
        __cpuid_count(leaf, subleaf, a, b, c, d);
        set_cpuid(0);
        mask(leaf, subleaf, &a, &b, &c, &d);
        r[REG_RAX] = a, r[REG_RBX] = b, r[REG_RCX] = c, r[REG_RDX] = d;
        r[REG_RIP] += 2;
    } else if (chained.sa_flags & SA_SIGINFO) {
        chained.sa_sigaction(signal, info, context);
    } else if (chained.sa_handler != SIG_DFL && chained.sa_handler != SIG_IGN) {
        chained.sa_handler(signal);
    } else {
        struct sigaction end;
        memset(&end, 0, sizeof end);
        end.sa_handler = SIG_DFL;
        real_sigaction(SIGSEGV, &end, 0);
    }
}

int sigaction(int number, const struct sigaction *action, struct sigaction *old) {
    if (!real_sigaction) real_sigaction = (sigaction_function)dlsym(RTLD_NEXT, "sigaction");
    if (number != SIGSEGV) return real_sigaction(number, action, old);
    if (old) *old = chained;
    if (action) chained = *action;
    return 0;
}

sighandler_t signal(int number, sighandler_t handler) {
    static sighandler_t (*real)(int, sighandler_t);
    if (!real) real = (sighandler_t(*)(int, sighandler_t))dlsym(RTLD_NEXT, "signal");
    if (number != SIGSEGV) return real(number, handler);
    sighandler_t old = chained.sa_handler;
    chained.sa_handler = handler;
    chained.sa_flags = 0;
    return old;
}

__attribute__((constructor(101))) static void start(void) {
    if (!real_sigaction) real_sigaction = (sigaction_function)dlsym(RTLD_NEXT, "sigaction");
    struct sigaction own;
    memset(&own, 0, sizeof own);
    own.sa_sigaction = handle;
    own.sa_flags = SA_SIGINFO | SA_NODEFER | SA_RESTART;
    sigemptyset(&own.sa_mask);
    real_sigaction(SIGSEGV, &own, 0);
    set_cpuid(0);
}
#endif

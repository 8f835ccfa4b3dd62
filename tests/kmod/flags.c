// SPDX-License-Identifier: GPL-3.0-or-later
// SPDX-FileCopyrightText: The hecaton.fleet authors
/*
 * flags: what the CPU makes of the flags that CMPXCHG16B leaves alone, all but ZF. Prints RFLAGS in hex, or "none" if the CPU
 * says that it does not have the instruction.
 *
 * The flags are loaded first, then computed by a subtraction, and asked for after the instruction: QEMU 7.2 forgets the
 * subtraction then and takes its operand for the flags, here a pointer as the kernel has them.
 */
#include <cpuid.h>
#include <stdint.h>
#include <stdio.h>

static uint64_t pair[2] __attribute__((aligned(16)));

int main(void)
{
	uint64_t flags, low = 0, high = 0;
	unsigned int eax, ebx, ecx, edx;

	if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(ecx & bit_CMPXCHG16B)) {
		puts("none");
		return 0;
	}
	asm volatile("pushfq; popfq; cmp %[operand], %[zero]; lock cmpxchg16b %[pair]; pushfq; pop %[flags]; cld"
		     : [flags] "=&r" (flags), "+a" (low), "+d" (high), [pair] "+m" (pair)
		     : [operand] "r" (0xffff8ea2c3f4b400), [zero] "r" (0ul), "b" (0ul), "c" (0ul)
		     : "cc", "memory");
	printf("%lx\n", flags);
	return 0;
}

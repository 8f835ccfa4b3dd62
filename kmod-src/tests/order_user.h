/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What order.c takes from the kernel, for user space.
 */
#ifndef _RRAM_ORDER_USER_H
#define _RRAM_ORDER_USER_H

#include <stdbool.h>
#include <string.h>

typedef unsigned char u8;
typedef unsigned long long u64;

#define BITS_PER_LONG (8 * sizeof(long))
#define ARRAY_SIZE(array) (sizeof(array) / sizeof((array)[0]))

#define min(a, b) ({			\
	__typeof__(a) _a = (a);		\
	__typeof__(b) _b = (b);		\
	(void)(&_a == &_b);		\
	_a < _b ? _a : _b;		\
})

static inline bool test_bit(unsigned long bit, const unsigned long *map)
{
	return map[bit / BITS_PER_LONG] >> (bit % BITS_PER_LONG) & 1;
}

static inline void __set_bit(unsigned long bit, unsigned long *map)
{
	map[bit / BITS_PER_LONG] |= 1UL << (bit % BITS_PER_LONG);
}

static inline void __clear_bit(unsigned long bit, unsigned long *map)
{
	map[bit / BITS_PER_LONG] &= ~(1UL << (bit % BITS_PER_LONG));
}

static inline unsigned long find_next_bit(const unsigned long *map,
					  unsigned long size,
					  unsigned long bit)
{
	unsigned long word;

	while (bit < size) {
		word = map[bit / BITS_PER_LONG] >> (bit % BITS_PER_LONG);
		if (word) {
			bit += __builtin_ctzl(word);
			return bit < size ? bit : size;
		}
		bit = (bit / BITS_PER_LONG + 1) * BITS_PER_LONG;
	}
	return size;
}

static inline void *memchr_inv(const void *start, int c, size_t bytes)
{
	const u8 *byte = start;
	u64 word, all = 0x0101010101010101ULL * (u8)c;

	for (; bytes >= sizeof(word); byte += 8, bytes -= 8) {
		memcpy(&word, byte, sizeof(word));
		if (word != all)
			break;
	}
	for (; bytes; byte++, bytes--)
		if (*byte != (u8)c)
			return (void *)byte;
	return NULL;
}

#endif /* _RRAM_ORDER_USER_H */

/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Threads that touch pages which are not here, and measure how long that
 * takes: the same for a remote_ram file and for its rival in user space.
 */
#ifndef _RRAM_LOAD_H
#define _RRAM_LOAD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define PAGE 4096UL

/**
 * struct load - what is touched
 * @base: where the pages are mapped
 * @page: numbers of the pages to touch, in this order
 * @nr: how many
 * @threads: who share them, each an equal part, in a row
 * @seed: what the pages hold follows from it, see load_word()
 */
struct load {
	const char *base;
	const unsigned long *page;
	unsigned long nr;
	unsigned int threads;
	uint64_t seed;
};

/* The word at @at (counted in words) of a page. Never 0. */
uint64_t load_word(unsigned long page, uint64_t seed, unsigned int at);
/* Fills pages from @page on. */
void load_fill(char *to, unsigned long page, unsigned long nr, uint64_t seed);
/* Numbers from @first to @first + @nr - 1, shuffled if so wanted. */
unsigned long *load_pages(unsigned long first, unsigned long nr, bool shuffled,
			  uint64_t seed);
/*
 * Touches the pages, compares all their contents, and prints a JSON object.
 * Returns how many pages were wrong.
 */
unsigned long load_run(const struct load *load);

/* Prints what is known of times in ns as a JSON object; sorts them. */
void load_print_times(uint64_t *ns, size_t nr);
uint64_t load_now(void);	/* ns */
/* A list like 1,4,16 into @to; returns how many, exits if it is none. */
unsigned int load_list(const char *text, unsigned int *to, unsigned int max);
__attribute__((noreturn)) void die(const char *what, int error);

#endif /* _RRAM_LOAD_H */

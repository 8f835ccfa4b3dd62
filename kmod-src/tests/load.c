// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * See load.h.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>

#include "load.h"

#define WORDS (PAGE / sizeof(uint64_t))

void die(const char *what, int error)
{
	fprintf(stderr, "%s: %s\n", what, strerror(error));
	exit(1);
}

uint64_t load_now(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000000ULL + now.tv_nsec;
}

uint64_t load_word(unsigned long page, uint64_t seed, unsigned int at)
{
	uint64_t x = (page + 1) * 0x9e3779b97f4a7c15ULL ^
		     seed * 0xbf58476d1ce4e5b9ULL ^ at;

	x ^= x >> 31;
	x *= 0x94d049bb133111ebULL;
	return (x ^ x >> 29) | 1;
}

void load_fill(char *to, unsigned long page, unsigned long nr, uint64_t seed)
{
	uint64_t *word = (uint64_t *)to;
	unsigned int at;

	for (; nr; nr--, page++)
		for (at = 0; at < WORDS; at++)
			*word++ = load_word(page, seed, at);
}

unsigned long *load_pages(unsigned long first, unsigned long nr, bool shuffled,
			  uint64_t seed)
{
	unsigned long *page = malloc(nr * sizeof(*page)), i, j, other;
	uint64_t x = seed * 2 + 1;

	if (!page)
		die("list of pages", 12);
	for (i = 0; i < nr; i++)
		page[i] = first + i;
	for (i = nr; shuffled && i > 1; i--) {
		x ^= x << 13;
		x ^= x >> 7;
		x ^= x << 17;
		j = x % i;
		other = page[j];
		page[j] = page[i - 1];
		page[i - 1] = other;
	}
	return page;
}

unsigned int load_list(const char *text, unsigned int *to, unsigned int max)
{
	unsigned int nr = 0;
	char *end;

	do {
		to[nr] = strtoul(text, &end, 10);
		if (end == text || (*end && *end != ',') || !to[nr])
			die(text, 22);
		nr++;
		text = end + 1;
	} while (*end && nr < max);
	return nr;
}

static int by_size(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return x < y ? -1 : x > y;
}

void load_print_times(uint64_t *ns, size_t nr)
{
	double sum = 0;
	size_t i;

	qsort(ns, nr, sizeof(*ns), by_size);
	for (i = 0; i < nr; i++)
		sum += ns[i];
	printf("{\"n\": %zu", nr);
	if (nr)
		printf(", \"min\": %.1f, \"median\": %.1f, \"p90\": %.1f, \"p99\": %.1f, \"max\": %.1f, \"mean\": %.1f",
		       ns[0] / 1e3, ns[nr / 2] / 1e3, ns[nr * 9 / 10] / 1e3,
		       ns[nr * 99 / 100] / 1e3, ns[nr - 1] / 1e3,
		       sum / nr / 1e3);
	printf("}");
}

struct worker {
	const struct load *load;
	pthread_barrier_t *start;
	pthread_t thread;
	unsigned long from, to;
	uint64_t *ns;
	uint64_t begun, ended;
	unsigned long early;	/* touches that saw something else */
};

static void *work(void *arg)
{
	struct worker *w = arg;
	const struct load *load = w->load;
	unsigned long i, page;
	uint64_t before, word;

	pthread_barrier_wait(w->start);
	w->begun = load_now();
	for (i = w->from; i < w->to; i++) {
		page = load->page[i];
		before = load_now();
		word = *(const volatile uint64_t *)(load->base + page * PAGE);
		w->ns[i] = load_now() - before;
		if (word != load_word(page, load->seed, 0))
			w->early++;
	}
	w->ended = load_now();
	return NULL;
}

static double cpu_seconds(void)
{
	struct rusage use;

	getrusage(RUSAGE_SELF, &use);
	return use.ru_utime.tv_sec + use.ru_stime.tv_sec +
	       (use.ru_utime.tv_usec + use.ru_stime.tv_usec) / 1e6;
}

unsigned long load_run(const struct load *load)
{
	struct worker *w = calloc(load->threads, sizeof(*w));
	uint64_t *ns = calloc(load->nr, sizeof(*ns)), begun = ~0ULL, ended = 0;
	unsigned long bad = 0, i, page;
	pthread_barrier_t start;
	double cpu = cpu_seconds();
	unsigned int t, at;
	int err;

	if (!w || !ns)
		die("load", 12);
	pthread_barrier_init(&start, NULL, load->threads);
	for (t = 0; t < load->threads; t++) {
		w[t].load = load;
		w[t].start = &start;
		w[t].from = load->nr * t / load->threads;
		w[t].to = load->nr * (t + 1) / load->threads;
		w[t].ns = ns;
		err = pthread_create(&w[t].thread, NULL, work, &w[t]);
		if (err)
			die("thread", err);
	}
	for (t = 0; t < load->threads; t++) {
		pthread_join(w[t].thread, NULL);
		bad += w[t].early;
		begun = w[t].begun < begun ? w[t].begun : begun;
		ended = w[t].ended > ended ? w[t].ended : ended;
	}
	cpu = cpu_seconds() - cpu;
	for (i = 0; i < load->nr; i++) {
		page = load->page[i];
		for (at = 0; at < WORDS; at++)
			if (((const uint64_t *)(load->base + page * PAGE))[at] !=
			    load_word(page, load->seed, at))
				break;
		bad += at < WORDS;
	}
	printf("{\"threads\": %u, \"bad\": %lu, \"seconds\": %.6f, \"cpu_seconds\": %.6f, \"touch_us\": ",
	       load->threads, bad, (ended - begun) / 1e9, cpu);
	load_print_times(ns, load->nr);
	printf("}");
	free(ns);
	free(w);
	return bad;
}

// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * How many pages of a VM's working set have to be fetched while it waits.
 *
 *   order_sim [options] TRACE...      a table; TRACE is a file or made:PATTERN
 *
 *   --bandwidth 1000   of the link, in MB/s
 *   --latency 20       of a READ of one page on an idle link, in us
 *   --batch 32         longest run of a background READ, in pages
 *   --depth 2          background READs under way
 *   --json             one JSON object instead of a table
 *
 * A trace is text: "pages N", then "m FIRST NR HEAT" for pages missing at the
 * switch, then "t US PAGE" for a touch so many us after the switch. A touch of
 * a page that is not here stops the VM until it is: all later ones are as much
 * later. PATTERN is sequential, random, hot or database, with all pages
 * missing, or +precopy, where only what was dirtied of late is.
 *
 * Policies: "none" fetches what is asked for and nothing else; "push" goes from
 * the first page to the last; "bubble" grows evenly around the last fault, as
 * in Hines and Gopalan; "ours" is src/order.c.
 */
#include <errno.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>

#include "../src/order.h"

struct trace {
	unsigned long pages;
	u8 *heat;
	unsigned long *missing;
	unsigned long nr_missing;
	struct touch {
		double us;
		unsigned long page;
	} *touch;
	unsigned long nr, room;
};

enum policy { NONE, PUSH, BUBBLE, OURS, POLICIES };

static const char * const policy_name[] = { "none", "push", "bubble", "ours" };

static double page_us, latency_us;
static unsigned int batch = 32, depth = 2;

static void *need(void *memory)
{
	if (!memory) {
		fputs("order_sim: no memory\n", stderr);
		exit(1);
	}
	return memory;
}

static unsigned long *new_map(unsigned long bits)
{
	return need(calloc(bits / BITS_PER_LONG + 1, sizeof(long)));
}

static void size_trace(struct trace *t, unsigned long pages)
{
	t->pages = pages;
	t->heat = need(calloc(pages, 1));
	t->missing = new_map(pages);
}

static void add_touch(struct trace *t, double us, unsigned long page)
{
	if (t->nr == t->room) {
		t->room = t->room ? 2 * t->room : 4096;
		t->touch = need(realloc(t->touch, t->room * sizeof(*t->touch)));
	}
	t->touch[t->nr++] = (struct touch){ us, page };
}

static void add_missing(struct trace *t, unsigned long first, unsigned long nr,
			unsigned int heat)
{
	for (; nr; nr--, first++) {
		t->nr_missing += !test_bit(first, t->missing);
		__set_bit(first, t->missing);
		t->heat[first] = heat;
	}
}

/* -- the link and the pull ------------------------------------------------ */

struct flight {
	struct rram_run run;
	double arrives;
};

struct sim {
	const struct trace *t;
	enum policy policy;
	struct rram_order order;
	unsigned long *missing, *inflight;
	unsigned long left;
	double free_at;			/* when the link's queue is empty */
	struct flight *flight;
	unsigned int flying;
	unsigned long low, high;	/* BUBBLE: all between was looked at */
	bool up;
	unsigned long cursor;		/* PUSH */
};

static bool wanted(struct sim *s, unsigned long page)
{
	return test_bit(page, s->missing) && !test_bit(page, s->inflight);
}

static struct rram_run next_run(struct sim *s)
{
	struct rram_run run = { 0 };
	bool bubble;

	switch (s->policy) {
	case PUSH:
		while (s->cursor < s->t->pages && !wanted(s, s->cursor))
			s->cursor++;
		run.first = s->cursor;
		while (s->cursor < s->t->pages && run.nr < batch &&
		       wanted(s, s->cursor)) {
			s->cursor++;
			run.nr++;
		}
		break;
	case BUBBLE:
		while (!run.nr && (s->low || s->high < s->t->pages)) {
			s->up = !s->up;
			if (s->up && s->high < s->t->pages) {
				run.first = s->high;
				while (s->high < s->t->pages && run.nr < batch &&
				       wanted(s, s->high)) {
					s->high++;
					run.nr++;
				}
				s->high += !run.nr;
			} else if (!s->up && s->low) {
				while (s->low && run.nr < batch &&
				       wanted(s, s->low - 1)) {
					s->low--;
					run.nr++;
				}
				run.first = s->low;
				s->low -= !run.nr;
			}
		}
		break;
	case OURS:
		do {
			run = rram_order_next(&s->order, s->missing, s->inflight,
					      s->t->heat, batch, &bubble);
		} while (!run.nr && !rram_order_idle(&s->order, run));
		break;
	default:
		break;
	}
	return run;
}

/* Sends a READ at @now; returns when its pages are here. */
static double send(struct sim *s, double now, unsigned int nr)
{
	double begin = now + latency_us - page_us;

	if (begin < s->free_at)
		begin = s->free_at;
	s->free_at = begin + nr * page_us;
	return s->free_at;
}

/* A READ that somebody waits for: only the page on the wire is before it. */
static double send_urgent(struct sim *s, double now)
{
	double begin = now + latency_us - page_us;

	if (s->free_at > begin)
		begin += page_us / 2;
	s->free_at = (s->free_at > begin ? s->free_at : begin) + page_us;
	return begin + page_us;
}

static void refill(struct sim *s, double now)
{
	struct rram_run run;
	unsigned long page;

	while (s->left && s->flying < depth) {
		run = next_run(s);
		if (!run.nr)
			return;
		for (page = run.first; page < run.first + run.nr; page++)
			__set_bit(page, s->inflight);
		s->flight[s->flying++] = (struct flight){
			run, send(s, now, run.nr),
		};
	}
}

static void land(struct sim *s, struct rram_run run)
{
	unsigned long page;

	for (page = run.first; page < run.first + run.nr; page++) {
		__clear_bit(page, s->missing);
		__clear_bit(page, s->inflight);
		s->left--;
	}
}

/* Lets time go on; what arrives makes room for the next READs. */
static void until(struct sim *s, double now)
{
	unsigned int i, first;
	struct flight f;

	for (;;) {
		for (first = 0, i = 1; i < s->flying; i++)
			if (s->flight[i].arrives < s->flight[first].arrives)
				first = i;
		if (!s->flying || s->flight[first].arrives > now)
			return;
		f = s->flight[first];
		s->flight[first] = s->flight[--s->flying];
		land(s, f.run);
		refill(s, f.arrives);
	}
}

struct result {
	unsigned long touched, faults, joined;
	double waited_us;
};

static struct result simulate(const struct trace *t, enum policy policy)
{
	struct sim s = { .t = t, .policy = policy, .left = t->nr_missing };
	unsigned long *seen = new_map(t->pages), i, page;
	struct result r = { 0 };
	double late = 0, now, arrives;
	unsigned int f;

	s.missing = new_map(t->pages);
	memcpy(s.missing, t->missing, (t->pages / BITS_PER_LONG + 1) * sizeof(long));
	s.inflight = new_map(t->pages);
	s.flight = need(calloc(depth, sizeof(*s.flight)));
	s.high = 0;
	rram_order_init(&s.order, t->pages);
	refill(&s, 0);
	for (i = 0; i < t->nr; i++) {
		page = t->touch[i].page;
		now = t->touch[i].us + late;
		until(&s, now);
		r.touched += !test_bit(page, seen);
		__set_bit(page, seen);
		if (!test_bit(page, s.missing))
			continue;
		rram_order_fault(&s.order, page);
		if (test_bit(page, s.inflight)) {
			r.joined++;
			arrives = now;
			for (f = 0; f < s.flying; f++)
				if (page - s.flight[f].run.first < s.flight[f].run.nr)
					arrives = s.flight[f].arrives;
			until(&s, arrives);
		} else {
			r.faults++;
			__set_bit(page, s.inflight);
			s.low = page;
			s.high = page + 1;
			arrives = send_urgent(&s, now);
			/* The bubble begins at once, behind the page itself. */
			refill(&s, now);
			until(&s, arrives);
			land(&s, (struct rram_run){ page, 1 });
		}
		late += arrives - now;
		r.waited_us += arrives - now;
	}
	free(s.missing);
	free(s.inflight);
	free(s.flight);
	free(seen);
	return r;
}

/* -- traces --------------------------------------------------------------- */

static void read_trace(struct trace *t, const char *path)
{
	unsigned long a, b, heat, number = 0;
	FILE *f = fopen(path, "r");
	char line[128];
	double us;

	if (!f) {
		perror(path);
		exit(1);
	}
	while (fgets(line, sizeof(line), f)) {
		number++;
		if (line[0] == '#')
			continue;
		if (!t->pages && sscanf(line, "pages %lu", &a) == 1 && a)
			size_trace(t, a);
		else if (sscanf(line, "m %lu %lu %lu", &a, &b, &heat) == 3 &&
			 a + b <= t->pages && heat < RRAM_HEAT_CLASSES)
			add_missing(t, a, b, heat);
		else if (sscanf(line, "t %lf %lu", &us, &a) == 2 && a < t->pages)
			add_touch(t, us, a);
		else {
			fprintf(stderr, "%s:%lu: not a line of a trace\n", path, number);
			exit(1);
		}
	}
	if (!t->pages || !t->nr) {
		fprintf(stderr, "%s: the trace is empty\n", path);
		exit(1);
	}
	fclose(f);
}

static unsigned long long dice;

static unsigned long rnd(unsigned long below)
{
	dice ^= dice << 13;
	dice ^= dice >> 7;
	dice ^= dice << 17;
	return dice % below;
}

#define MADE_PAGES 65536UL	/* 256 MiB */
#define MADE_SET 16384UL	/* of which the program uses so many */
#define MADE_BLOCK 256UL	/* in pieces of up to so many in a row */

/*
 * A guest's program does not see where its pages lie: the guest's kernel gives
 * it memory in pieces, some upwards, some downwards.
 */
static void lay_out(unsigned long *place)
{
	unsigned long order[MADE_PAGES / MADE_BLOCK], i, j, k, n = 0, nr;
	bool down;

	for (i = 0; i < MADE_PAGES / MADE_BLOCK; i++)
		order[i] = i;
	for (i = MADE_PAGES / MADE_BLOCK - 1; i; i--) {
		j = rnd(i + 1);
		k = order[i];
		order[i] = order[j];
		order[j] = k;
	}
	for (i = 0; n < MADE_SET; i++) {
		nr = MADE_BLOCK >> rnd(5);
		down = rnd(2);
		for (k = 0; k < nr && n < MADE_SET; k++)
			place[n++] = order[i % (MADE_PAGES / MADE_BLOCK)] * MADE_BLOCK +
				     (down ? nr - 1 - k : k);
		if (i + 1 == MADE_PAGES / MADE_BLOCK)
			break;
	}
	/* What is left, if the pieces were small: anywhere. */
	for (; n < MADE_SET; n++)
		place[n] = rnd(MADE_PAGES);
}

static void make_trace(struct trace *t, const char *pattern)
{
	bool precopy = strstr(pattern, "+precopy");
	unsigned long *place = need(calloc(MADE_SET, sizeof(*place)));
	unsigned long i, at = 0, kernel[512];
	double us = 0;

	dice = 88172645463325252ULL;
	size_trace(t, MADE_PAGES);
	lay_out(place);
	for (i = 0; i < 512; i++)
		kernel[i] = rnd(MADE_PAGES);
	for (i = 0; i < 200000; i++) {
		us += 2;
		if (i % 16 == 0) {	/* the guest's kernel */
			add_touch(t, us, kernel[rnd(512)]);
			continue;
		}
		if (!strncmp(pattern, "sequential", 10))
			at = i / 4 % MADE_SET;
		else if (!strncmp(pattern, "random", 6))
			at = rnd(MADE_SET);
		else if (!strncmp(pattern, "hot", 3))
			at = rnd(10) ? rnd(MADE_SET / 8) : rnd(MADE_SET);
		else if (!strncmp(pattern, "database", 8))
			/* Some keys are wanted often; a record is two pages. */
			at = (rnd(1000) * rnd(1000) * rnd(1000) / 1000000 *
			      MADE_SET / 1000 + i % 2) % MADE_SET;
		else {
			fprintf(stderr, "made:%s: no such pattern\n", pattern);
			exit(1);
		}
		add_touch(t, us, place[at]);
	}
	if (!precopy) {
		add_missing(t, 0, MADE_PAGES, RRAM_HEAT_COLD);
	} else {
		/* Dirty at the switch: what is written often; some is left over. */
		for (i = 0; i < MADE_SET; i++)
			if (rnd(4))
				add_missing(t, place[i], 1, i < MADE_SET / 8 || rnd(3) ?
					    RRAM_HEAT_HOT : RRAM_HEAT_WARM);
		for (i = 0; i < 512; i++)
			add_missing(t, kernel[i], 1, RRAM_HEAT_HOT);
		add_missing(t, MADE_PAGES * 3 / 4, MADE_PAGES / 8, RRAM_HEAT_COLD);
	}
	free(place);
}

int main(int argc, char **argv)
{
	static const struct option options[] = {
		{ "bandwidth", required_argument, NULL, 'b' },
		{ "latency", required_argument, NULL, 'l' },
		{ "batch", required_argument, NULL, 'n' },
		{ "depth", required_argument, NULL, 'd' },
		{ "json", no_argument, NULL, 'j' },
		{ }
	};
	double mb = 1000;
	bool json = false;
	unsigned int p;
	int c, first;

	latency_us = 20;
	while ((c = getopt_long(argc, argv, "", options, NULL)) != -1) {
		if (c == 'b')
			mb = atof(optarg);
		else if (c == 'l')
			latency_us = atof(optarg);
		else if (c == 'n')
			batch = atoi(optarg);
		else if (c == 'd')
			depth = atoi(optarg);
		else if (c == 'j')
			json = true;
		else
			return 2;
	}
	page_us = 4096 / mb;
	if (optind == argc || mb <= 0 || latency_us < page_us || !batch ||
	    batch > RRAM_CHUNK_PAGES || !depth) {
		fprintf(stderr, "usage: %s [options] TRACE...; the latency covers one page's time on the link\n",
			argv[0]);
		return 2;
	}
	if (json)
		printf("{\"bandwidth_mb_s\": %g, \"latency_us\": %g, \"batch\": %u, \"depth\": %u, \"traces\": [",
		       mb, latency_us, batch, depth);
	else
		printf("%-22s %8s %8s  %-7s %8s %7s %7s %10s\n", "trace", "touched",
		       "missing", "policy", "faults", "share", "joined", "waited_ms");
	for (first = optind; optind < argc; optind++) {
		struct trace t = { 0 };

		if (!strncmp(argv[optind], "made:", 5))
			make_trace(&t, argv[optind] + 5);
		else
			read_trace(&t, argv[optind]);
		for (p = 0; p < POLICIES; p++) {
			struct result r = simulate(&t, p);

			printf(json ? "%s{\"trace\": \"%s\", \"touched\": %lu, \"missing\": %lu, \"policy\": \"%s\", \"faults\": %lu, \"share\": %.4f, \"joined\": %.4f, \"waited_ms\": %.3f}" :
			       "%s%-22s %8lu %8lu  %-7s %8lu %6.3f  %6.3f  %9.1f\n",
			       json && (optind > first || p) ? ", " : "",
			       argv[optind], r.touched, t.nr_missing, policy_name[p],
			       r.faults, (double)r.faults / r.touched,
			       (double)r.joined / r.touched, r.waited_us / 1000);
		}
		free(t.heat);
		free(t.missing);
		free(t.touch);
	}
	if (json)
		puts("]}");
	return 0;
}

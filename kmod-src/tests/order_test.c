// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Unit tests of src/order.c. Exits with 1 and says where at the first failure.
 */
#include <stdio.h>
#include <stdlib.h>

#include "../src/order.h"

#define CHECK(cond, ...) do {						\
	if (!(cond)) {							\
		fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #cond);\
		fprintf(stderr, __VA_ARGS__);				\
		fputc('\n', stderr);					\
		exit(1);						\
	}								\
} while (0)

/* The state of a pull, as the module keeps it. */
struct pull {
	struct rram_order order;
	unsigned long npages;
	unsigned long *missing;
	unsigned long *inflight;
	u8 *heat;
	unsigned long scans;	/* empty runs that said "ask again" */
};

static unsigned long *new_map(unsigned long bits)
{
	/* Exactly as long as it has to be: a read behind it is found. */
	unsigned long *map = calloc((bits + BITS_PER_LONG - 1) / BITS_PER_LONG,
				    sizeof(long));

	CHECK(map, "no memory");
	return map;
}

static void begin(struct pull *p, unsigned long npages)
{
	p->npages = npages;
	p->missing = new_map(npages);
	p->inflight = new_map(npages);
	p->heat = calloc(npages, 1);
	CHECK(p->heat, "no memory");
	p->scans = 0;
	rram_order_init(&p->order, npages);
}

static void end(struct pull *p)
{
	free(p->missing);
	free(p->inflight);
	free(p->heat);
}

static void miss(struct pull *p, unsigned long first, unsigned long last)
{
	for (; first <= last; first++)
		__set_bit(first, p->missing);
}

/* Asks until there is a run or nothing left, and checks what always holds. */
static struct rram_run ask(struct pull *p, unsigned int max, bool *bubble)
{
	struct rram_run run;
	unsigned long page;

	do {
		run = rram_order_next(&p->order, p->missing, p->inflight,
				      p->heat, max, bubble);
		p->scans += !run.nr;
	} while (!run.nr && !rram_order_idle(&p->order, run));
	CHECK(run.nr <= max, "%u > %u", run.nr, max);
	if (!run.nr)
		return run;
	CHECK(run.first + run.nr <= p->npages, "%lu", run.first);
	CHECK(run.first / RRAM_CHUNK_PAGES ==
	      (run.first + run.nr - 1) / RRAM_CHUNK_PAGES,
	      "%lu+%u crosses a chunk", run.first, run.nr);
	for (page = run.first; page < run.first + run.nr; page++) {
		CHECK(test_bit(page, p->missing), "%lu is here", page);
		CHECK(!test_bit(page, p->inflight), "%lu comes twice", page);
		__set_bit(page, p->inflight);
	}
	return run;
}

static void arrive(struct pull *p, struct rram_run run)
{
	unsigned long page;

	for (page = run.first; page < run.first + run.nr; page++) {
		__clear_bit(page, p->missing);
		__clear_bit(page, p->inflight);
	}
}

/* A demand fault, whose page is fetched at once. */
static void fault(struct pull *p, unsigned long page)
{
	rram_order_fault(&p->order, page);
	arrive(p, (struct rram_run){ page, 1 });
}

static void expect(struct pull *p, unsigned int max, unsigned long first,
		   unsigned int nr, bool bubble)
{
	bool in_bubble;
	struct rram_run run = ask(p, max, &in_bubble);

	CHECK(run.nr == nr && (!nr || run.first == first),
	      "%lu+%u, not %lu+%u", run.first, run.nr, first, nr);
	CHECK(in_bubble == bubble, "%lu+%u", first, nr);
	arrive(p, run);
}

static void test_heat(void)
{
	static const struct {
		unsigned int round, dirtied_in;
		enum rram_heat heat;
	} table[] = {
		{ 1, 1, RRAM_HEAT_HOT },
		{ 2, 1, RRAM_HEAT_HOT },
		{ 3, 1, RRAM_HEAT_WARM },
		{ 8, 1, RRAM_HEAT_WARM },
		{ 9, 1, RRAM_HEAT_COOL },
		{ 255, 1, RRAM_HEAT_COOL },
		{ 256, 255, RRAM_HEAT_HOT },	/* marks start again */
		{ 257, 255, RRAM_HEAT_WARM },
		{ 300, 299, RRAM_HEAT_HOT },
		{ 300, 292, RRAM_HEAT_COOL },
	};
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(table); i++)
		CHECK(rram_heat_of(table[i].round,
				   rram_round_mark(table[i].dirtied_in)) ==
		      table[i].heat, "row %u", i);
	for (i = 1; i < 1000; i++) {
		CHECK(rram_round_mark(i), "round %u has no mark", i);
		CHECK(rram_heat_of(i, 0) == RRAM_HEAT_COLD, "round %u", i);
	}
}

static void test_offer(void)
{
	unsigned long npages = 600, *map = new_map(npages), from;
	u8 *dirtied = calloc(npages, 1);
	struct rram_run run;
	unsigned int seen[2] = {};
	int hot;

	CHECK(dirtied, "no memory");
	for (from = 100; from < 600; from++)
		__set_bit(from, map);
	for (from = 200; from < 210; from++)
		dirtied[from] = rram_round_mark(4);
	dirtied[300] = rram_round_mark(2);

	run = rram_order_offer(map, dirtied, 5, false, 0, npages, 16);
	CHECK(run.first == 100 && run.nr == 16, "%lu+%u", run.first, run.nr);
	run = rram_order_offer(map, dirtied, 5, false, 116, npages, 16);
	CHECK(run.first == 116 && run.nr == 12, "%lu+%u", run.first, run.nr);
	run = rram_order_offer(map, dirtied, 5, false, 128, npages, 256);
	CHECK(run.first == 128 && run.nr == 72, "%lu+%u", run.first, run.nr);
	run = rram_order_offer(map, dirtied, 5, false, 200, npages, 256);
	CHECK(run.first == 210 && run.nr == 46, "%lu+%u", run.first, run.nr);
	run = rram_order_offer(map, dirtied, 5, true, 0, npages, 256);
	CHECK(run.first == 200 && run.nr == 10, "%lu+%u", run.first, run.nr);
	run = rram_order_offer(map, dirtied, 5, true, 210, npages, 256);
	CHECK(run.first == npages && !run.nr, "%lu+%u", run.first, run.nr);

	/* Two passes offer each page once. */
	for (hot = 0; hot < 2; hot++)
		for (from = 0; from < npages; from = run.first + run.nr) {
			run = rram_order_offer(map, dirtied, 5, hot, from,
					       npages, 7);
			seen[hot] += run.nr;
		}
	CHECK(seen[0] == 490 && seen[1] == 10, "%u, %u", seen[0], seen[1]);
	free(map);
	free(dirtied);
}

static void test_hottest_first(void)
{
	struct pull p;

	begin(&p, 1000);
	miss(&p, 10, 19);
	miss(&p, 250, 260);
	miss(&p, 900, 903);
	memset(p.heat + 900, RRAM_HEAT_HOT, 4);
	memset(p.heat + 250, RRAM_HEAT_WARM, 3);
	memset(p.heat + 253, RRAM_HEAT_HOT, 1);
	expect(&p, 256, 253, 1, false);
	expect(&p, 256, 900, 4, false);
	expect(&p, 256, 250, 3, false);
	expect(&p, 4, 10, 4, false);
	expect(&p, 256, 14, 6, false);
	expect(&p, 256, 254, 2, false);		/* a chunk ends at 256 */
	expect(&p, 256, 256, 5, false);
	expect(&p, 256, 0, 0, false);
	end(&p);
}

static void test_bubble_grows_on_both_sides(void)
{
	struct pull p;

	begin(&p, 4096);
	miss(&p, 0, 4095);
	memset(p.heat, RRAM_HEAT_HOT, 8);
	fault(&p, 1000);
	expect(&p, 8, 1001, 8, true);
	expect(&p, 8, 992, 8, true);
	expect(&p, 8, 1009, 8, true);
	expect(&p, 8, 984, 8, true);
	expect(&p, 8, 0, 8, false);		/* its budget is spent */
	end(&p);
}

static void test_bubble_at_the_ends_of_the_file(void)
{
	struct pull p;

	begin(&p, 300);
	miss(&p, 0, 299);
	fault(&p, 0);
	expect(&p, 16, 1, 16, true);
	expect(&p, 16, 17, 16, true);
	fault(&p, 299);
	expect(&p, 16, 283, 16, true);
	expect(&p, 16, 267, 16, true);
	expect(&p, 256, 33, 95, false);
	expect(&p, 256, 128, 128, false);
	end(&p);
}

static void test_bubble_follows_a_sequence(void)
{
	unsigned int faults = 0;
	unsigned long page;
	struct pull p;
	bool bubble;

	/* A reader that is as fast as the link: two pages for two pages. */
	begin(&p, 8192);
	miss(&p, 0, 8191);
	for (page = 2000; page < 6000; page++) {
		if (test_bit(page, p.missing)) {
			fault(&p, page);
			faults++;
		}
		arrive(&p, ask(&p, 2, &bubble));
	}
	CHECK(faults < 100, "%u faults upwards", faults);
	end(&p);

	begin(&p, 8192);
	miss(&p, 0, 8191);
	for (faults = 0, page = 6000; page > 2000; page--) {
		if (test_bit(page, p.missing)) {
			fault(&p, page);
			faults++;
		}
		arrive(&p, ask(&p, 2, &bubble));
	}
	CHECK(faults < 100, "%u faults downwards", faults);
	end(&p);
}

static void test_pivots_take_turns(void)
{
	unsigned long base[4] = { 1000, 3000, 5000, 7000 };
	unsigned int runs[4] = {}, i, n;
	struct rram_run run;
	struct pull p;
	bool bubble;

	begin(&p, 8192);
	miss(&p, 0, 8191);
	for (i = 0; i < 4; i++)
		fault(&p, base[i]);
	for (n = 0; n < 8; n++) {
		run = ask(&p, 8, &bubble);
		CHECK(bubble, "run %u", n);
		for (i = 0; i < 4; i++)
			runs[i] += run.first + 100 > base[i] &&
				   run.first < base[i] + 100;
	}
	for (i = 0; i < 4; i++)
		CHECK(runs[i] >= 1 && runs[i] <= 3, "pivot %u: %u", i, runs[i]);

	/* The newest is served first, also when there are more than fit. */
	for (i = 0; i < 2 * RRAM_PIVOTS; i++) {
		fault(&p, 200 * i + 100);
		run = ask(&p, 4, &bubble);
		CHECK(bubble && run.first + 4 >= 200 * i + 100 &&
		      run.first <= 200 * i + 101, "%lu", run.first);
	}
	end(&p);
}

static void test_failed_pages_come_again(void)
{
	struct rram_run run;
	struct pull p;
	bool bubble;

	begin(&p, 1000);
	miss(&p, 0, 99);
	run = ask(&p, 256, &bubble);
	CHECK(run.nr == 100, "%u", run.nr);
	run = ask(&p, 256, &bubble);
	CHECK(!run.nr, "%lu+%u is in flight", run.first, run.nr);
	arrive(&p, (struct rram_run){ 0, 50 });
	for (unsigned long page = 50; page < 100; page++)
		__clear_bit(page, p.inflight);
	rram_order_failed(&p.order, 50);
	expect(&p, 256, 50, 50, false);
	expect(&p, 256, 0, 0, false);
	end(&p);
}

/* 16 GiB, of which little is missing: what is looked at grows with the file. */
static void test_large(void)
{
	unsigned long npages = 4UL << 20, page, runs = 0, pages = 0;
	struct rram_run run;
	struct pull p;
	bool bubble;

	begin(&p, npages);
	for (page = 5; page < npages; page += 4099) {
		__set_bit(page, p.missing);
		p.heat[page] = page % RRAM_HEAT_CLASSES;
	}
	while ((run = ask(&p, 256, &bubble)).nr) {
		arrive(&p, run);
		runs++;
		pages += run.nr;
		if (runs % 3 == 0)	/* faults far from all that is missing */
			rram_order_fault(&p.order, npages / 2 + runs);
	}
	CHECK(pages == npages / 4099 + 1, "%lu pages", pages);
	CHECK(p.scans < 1000, "%lu empty scans", p.scans);
	end(&p);
}

static unsigned int seed = 1;

static unsigned int rnd(unsigned int below)
{
	seed = seed * 1664525 + 1013904223;
	return (seed >> 8) % below;
}

/* Whatever is missing, faulted on, late or failed: every page comes, once. */
static void test_random(void)
{
	unsigned int round, i, flying, max, idle;
	struct rram_run fly[32], run;
	unsigned long page;
	struct pull p;
	bool bubble;

	for (round = 0; round < 400; round++) {
		begin(&p, 1 + rnd(5000));
		for (page = 0; page < p.npages; page++) {
			if (rnd(4) < round % 5)
				__set_bit(page, p.missing);
			p.heat[page] = rnd(8) < 4 ? 0 : rnd(4);
		}
		max = 1 + rnd(256);
		flying = 0;
		idle = 0;
		while (find_next_bit(p.missing, p.npages, 0) < p.npages) {
			if (rnd(3) == 0)
				rram_order_fault(&p.order, rnd(p.npages));
			if (rnd(5) == 0) {
				page = rnd(p.npages);
				if (test_bit(page, p.missing) &&
				    !test_bit(page, p.inflight))
					fault(&p, page);
			}
			if (flying < 32) {
				run = ask(&p, max, &bubble);
				if (run.nr)
					fly[flying++] = run;
				else if (!flying)
					idle++;
			}
			CHECK(idle < 2, "pages are forgotten");
			if (flying && rnd(2)) {
				i = rnd(flying);
				run = fly[i];
				fly[i] = fly[--flying];
				if (rnd(10)) {
					arrive(&p, run);
					continue;
				}
				for (page = run.first;
				     page < run.first + run.nr; page++)
					__clear_bit(page, p.inflight);
				rram_order_failed(&p.order, run.first);
			}
		}
		end(&p);
	}
}

int main(void)
{
	test_heat();
	test_offer();
	test_hottest_first();
	test_bubble_grows_on_both_sides();
	test_bubble_at_the_ends_of_the_file();
	test_bubble_follows_a_sequence();
	test_pivots_take_turns();
	test_failed_pages_come_again();
	test_large();
	test_random();
	puts("order: all tests passed");
	return 0;
}

// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * The order in which pages go. See order.h.
 *
 * Pre-copy offers the coldest pages first. The pull takes what lies around the
 * newest demand faults, in bubbles that grow on both sides, and where nobody
 * faults, the pages that were dirtied last.
 *
 * The bounds below make little difference on the made traces of
 * tests/order_sim.c; recorded ones may show better.
 */
#include "order.h"

/* What a bubble may take after its first fault, and at most. */
#define BUBBLE_FIRST	32U
#define BUBBLE_MOST	2048U

/* A fault so near to a bubble's edge belongs to it. */
#define BUBBLE_NEAR	64UL

/* A side that finds nothing within so many pages has ended. */
#define BUBBLE_GAP	512UL

/* How far one call scans behind the bubbles. */
#define SCAN_PAGES	32768UL

/**
 * rram_round_mark() - what a page found dirty is marked with
 * @round: number of the round, from 1 on
 *
 * A mark is one byte and never 0, which stands for "not dirtied": after 255
 * rounds the marks start again, and a page dirtied exactly so long ago looks
 * hot for a round. That costs some order and nothing else.
 *
 * Return: the mark.
 */
u8 rram_round_mark(unsigned int round)
{
	return 1 + (round - 1) % 255;
}

/**
 * rram_heat_of() - how hot a page is
 * @round: number of the present round, from 1 on
 * @dirtied: its mark, 0 if it was never found dirty after its first copy
 *
 * Return: its class.
 */
enum rram_heat rram_heat_of(unsigned int round, u8 dirtied)
{
	unsigned int age;

	if (!dirtied)
		return RRAM_HEAT_COLD;
	age = (rram_round_mark(round) + 255U - dirtied) % 255;
	if (age <= 1)
		return RRAM_HEAT_HOT;
	if (age <= 7)
		return RRAM_HEAT_WARM;
	return RRAM_HEAT_COOL;
}

/* The end of the chunk that @page lies in. */
static unsigned long chunk_end(unsigned long page)
{
	return (page | (RRAM_CHUNK_PAGES - 1)) + 1;
}

/**
 * rram_order_offer() - the next run of pages to offer in a pre-copy round
 * @map: pages that the destination lacks
 * @dirtied: for each page, the mark of the round that found it dirty last
 * @round: number of this round, from 1 on
 * @hot: false in the round's first pass: all but the hot pages; true in the
 *	second: the hot ones
 * @from: first page to look at
 * @end: page behind the last one
 * @max: longest run
 *
 * With the marks as they stood before this round's harvest, hot is what was
 * dirty in the last harvest too and is likely to be dirty again; a page that
 * is dirty for the first time goes with the cold ones.
 *
 * Return: a run; the pass goes on at its end. Without a page, an empty run at
 * @end.
 */
struct rram_run rram_order_offer(const unsigned long *map, const u8 *dirtied,
				 unsigned int round, bool hot,
				 unsigned long from, unsigned long end,
				 unsigned int max)
{
	struct rram_run run = { .first = end };
	unsigned long page, stop;

	for (page = find_next_bit(map, end, from); page < end;
	     page = find_next_bit(map, end, page + 1)) {
		if ((rram_heat_of(round, dirtied[page]) == RRAM_HEAT_HOT) == hot)
			break;
	}
	if (page >= end)
		return run;

	run.first = page;
	stop = min(end, min(chunk_end(page), page + max));
	do {
		run.nr++;
		page++;
	} while (page < stop && test_bit(page, map) &&
		 (rram_heat_of(round, dirtied[page]) == RRAM_HEAT_HOT) == hot);
	return run;
}

/**
 * rram_order_init() - begin a pull
 * @o: the order
 * @npages: pages of the file
 */
void rram_order_init(struct rram_order *o, unsigned long npages)
{
	memset(o, 0, sizeof(*o));
	o->npages = npages;
}

/**
 * rram_order_fault() - somebody waits for a page
 * @o: the order
 * @page: the page, below @o->npages
 *
 * To be called for every fault that waits, also when the page is in flight
 * already: that is how a bubble learns that it is too slow. The caller fetches
 * the page itself.
 */
void rram_order_fault(struct rram_order *o, unsigned long page)
{
	struct rram_pivot p;
	unsigned int i;

	for (i = 0; i < o->nr_pivots; i++) {
		p = o->pivot[i];
		if (page + BUBBLE_NEAR >= p.below &&
		    page < p.above + BUBBLE_NEAR)
			break;
	}
	if (i < o->nr_pivots) {
		/* Which half it is in says where the faults are heading. */
		if (page >= p.below + (p.above - p.below) / 2)
			p.trend = p.trend < 0 ? 0 : 1;
		else
			p.trend = p.trend > 0 ? 0 : -1;
		p.size = min(p.size * 2, BUBBLE_MOST);
	} else {
		p = (struct rram_pivot){
			.below = page,
			.above = page + 1,
			.size = BUBBLE_FIRST,
			.up = true,
		};
		if (o->nr_pivots < RRAM_PIVOTS)
			o->nr_pivots++;
		i = o->nr_pivots - 1;
	}
	p.left = p.size;
	memmove(&o->pivot[1], &o->pivot[0], i * sizeof(p));
	o->pivot[0] = p;
	o->newest = true;
}

/**
 * rram_order_failed() - pages that were in flight did not arrive
 * @o: the order
 * @first: the first of them
 *
 * The scan has passed them; it goes back, so that they are found again.
 */
void rram_order_failed(struct rram_order *o, unsigned long first)
{
	unsigned int heat;

	for (heat = 0; heat < RRAM_HEAT_CLASSES; heat++)
		o->cursor[heat] = min(o->cursor[heat], first);
}

static bool wanted(const unsigned long *missing, const unsigned long *inflight,
		   unsigned long page)
{
	return test_bit(page, missing) && !test_bit(page, inflight);
}

/* The first wanted page in [from, end), or end. */
static unsigned long next_wanted(const unsigned long *missing,
				 const unsigned long *inflight,
				 unsigned long from, unsigned long end)
{
	unsigned long page = find_next_bit(missing, end, from);

	while (page < end && test_bit(page, inflight))
		page = find_next_bit(missing, end, page + 1);
	return page;
}

/* The end of the last wanted page in [begin, from), or begin. */
static unsigned long prev_wanted(const unsigned long *missing,
				 const unsigned long *inflight,
				 unsigned long begin, unsigned long from)
{
	unsigned long page = from;

	while (page > begin && !wanted(missing, inflight, page - 1)) {
		page--;
		/* Whole words at once where nothing is missing. */
		while (!(page % BITS_PER_LONG) &&
		       page >= begin + BITS_PER_LONG &&
		       !missing[page / BITS_PER_LONG - 1])
			page -= BITS_PER_LONG;
	}
	return page;
}

/* Grows a bubble by one run at its upper side. An empty run: nothing is near. */
static struct rram_run grow_up(const struct rram_order *o, struct rram_pivot *p,
			       const unsigned long *missing,
			       const unsigned long *inflight, unsigned int max)
{
	unsigned long end = min(o->npages, p->above + BUBBLE_GAP);
	struct rram_run run = { .first = o->npages };
	unsigned long first, stop;

	first = next_wanted(missing, inflight, p->above, end);
	if (first >= end)
		return run;
	run.first = first;
	p->above = first;
	stop = min(o->npages, min(chunk_end(first), first + max));
	do {
		p->above++;
	} while (p->above < stop && wanted(missing, inflight, p->above));
	run.nr = p->above - first;
	return run;
}

/* The same at its lower side. */
static struct rram_run grow_down(const struct rram_order *o,
				 struct rram_pivot *p,
				 const unsigned long *missing,
				 const unsigned long *inflight,
				 unsigned int max)
{
	unsigned long begin = p->below > BUBBLE_GAP ? p->below - BUBBLE_GAP : 0;
	struct rram_run run = { .first = o->npages };
	unsigned long end, stop;

	end = prev_wanted(missing, inflight, begin, p->below);
	if (end <= begin)
		return run;
	p->below = end;
	stop = (end - 1) & ~(unsigned long)(RRAM_CHUNK_PAGES - 1);
	if (end - stop > max)
		stop = end - max;
	do {
		p->below--;
	} while (p->below > stop && wanted(missing, inflight, p->below - 1));
	run.first = p->below;
	run.nr = end - p->below;
	return run;
}

/* Grows a bubble on the side whose turn it is, or else on the other. */
static struct rram_run grow(const struct rram_order *o, struct rram_pivot *p,
			    const unsigned long *missing,
			    const unsigned long *inflight, unsigned int max)
{
	bool up = p->trend ? p->trend > 0 : p->up;
	struct rram_run run;
	unsigned int side;

	max = min(max, p->left);
	for (side = 0; side < 2; side++, up = !up) {
		run = up ? grow_up(o, p, missing, inflight, max) :
			   grow_down(o, p, missing, inflight, max);
		if (run.nr)
			break;
	}
	p->up = !up;
	p->left = run.nr ? p->left - run.nr : 0;
	return run;
}

static struct rram_run next_of_bubbles(struct rram_order *o,
				       const unsigned long *missing,
				       const unsigned long *inflight,
				       unsigned int max)
{
	struct rram_run run = { .first = o->npages };
	unsigned int i;

	if (o->newest) {
		o->newest = false;
		if (o->pivot[0].left)
			run = grow(o, &o->pivot[0], missing, inflight, max);
	}
	for (i = 0; i < o->nr_pivots && !run.nr; i++) {
		o->turn = (o->turn + 1) % o->nr_pivots;
		if (o->pivot[o->turn].left)
			run = grow(o, &o->pivot[o->turn], missing, inflight,
				   max);
	}
	return run;
}

/* The first wanted page of at least this heat in [from, end), or end. */
static unsigned long next_of_heat(const unsigned long *missing,
				  const unsigned long *inflight, const u8 *heat,
				  unsigned int class, unsigned long from,
				  unsigned long end)
{
	unsigned long page = from;
	const u8 *found;

	while (page < end) {
		if (class > RRAM_HEAT_COLD) {
			/* Most pages are cold: many of them at a time. */
			found = memchr_inv(heat + page, RRAM_HEAT_COLD,
					   end - page);
			if (!found)
				return end;
			page = found - heat;
		}
		if (heat[page] >= class && wanted(missing, inflight, page))
			return page;
		page = next_wanted(missing, inflight, page + 1, end);
	}
	return end;
}

static struct rram_run next_of_scan(struct rram_order *o,
				    const unsigned long *missing,
				    const unsigned long *inflight,
				    const u8 *heat, unsigned int max)
{
	struct rram_run run = { .first = o->npages };
	unsigned long page, end, stop, scan = SCAN_PAGES;
	int class = RRAM_HEAT_HOT;

	for (; class >= RRAM_HEAT_COLD; class--) {
		page = o->cursor[class];
		end = min(o->npages, page + scan);
		scan -= end - page;
		page = next_of_heat(missing, inflight, heat, class, page, end);
		o->cursor[class] = page;
		if (page < end)
			break;
		if (end < o->npages) {
			run.first = end;	/* ask again */
			return run;
		}
	}
	if (class < RRAM_HEAT_COLD)
		return run;

	run.first = page;
	stop = min(o->npages, min(chunk_end(page), page + max));
	do {
		page++;
	} while (page < stop && heat[page] >= class &&
		 wanted(missing, inflight, page));
	run.nr = page - run.first;
	o->cursor[class] = page;
	return run;
}

/**
 * rram_order_next() - what to fetch next, while nobody waits for a page
 * @o: the order
 * @missing: pages that are not here
 * @inflight: pages that are on their way
 * @heat: for each page, its enum rram_heat
 * @max: longest run, at least 1
 * @bubble: out, whether the run lies around a demand fault
 *
 * All pages of the run are missing and not in flight; the caller marks them
 * as in flight before it drops the lock, and tells rram_order_failed() of
 * those that do not arrive.
 *
 * Return: a run, or an empty one; see rram_order_idle().
 */
struct rram_run rram_order_next(struct rram_order *o,
				const unsigned long *missing,
				const unsigned long *inflight,
				const u8 *heat, unsigned int max,
				bool *bubble)
{
	struct rram_run run = next_of_bubbles(o, missing, inflight, max);

	*bubble = run.nr;
	if (!run.nr)
		run = next_of_scan(o, missing, inflight, heat, max);
	return run;
}

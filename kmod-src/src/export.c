// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * The source: offers pages ahead, says at the switch what the destination
 * does not have, and hands out keys by which it READs the rest.
 *
 * A chunk of 128 pages is registered under a key of its own, for REMOTE_READ
 * only, when it is first needed. Its pages are held from then on, so what the
 * key leads to stays what the page cache has - unless a hole was filled or a
 * page was punched out. Both set dirty bits, so each time a page is taken for
 * the destination it is compared with what is behind the key, and the chunk
 * gets a new key where they differ. The old key stays valid, and what is
 * behind it held, while the connection lasts: a READ by it may be on its way.
 * Pages that did not change are held once, for the newest key.
 */
#include <linux/highmem.h>
#include <linux/pagemap.h>
#include <linux/scatterlist.h>

#include "remote_ram.h"
#include "trace.h"

#define RRAM_REGS_MAX		32	/* registrations under way */
#define RRAM_KEYS_PER_MSG	16
#define RRAM_RETIRED_SHARE	4	/* keys retired, for each chunk, at most */
#define RRAM_REPLACED_SHARE	8	/* of the file: pages they may hold */
#define RRAM_REPLACED_MIN	1024

/**
 * struct rram_chunk - a registered chunk
 * @list: in rram_source.retired
 * @cqe: completion of its registration
 * @s: its session
 * @mr: the key
 * @first: first page
 * @nr: number of pages
 * @ready: the registration was made
 * @stale: something behind the key has changed
 * @patched: there are zeroes behind the key in place of what can't be read
 * @page: what is behind the key; the zero page for a hole; NULL once the key
 *	that took over holds it
 * @dma: where the device sees it, or NULL if devices see it as we do
 * @wr: the work request that registers it
 */
struct rram_chunk {
	struct list_head list;
	struct ib_cqe cqe;
	struct rram_session *s;
	struct ib_mr *mr;
	unsigned long first;
	unsigned int nr;
	bool ready;
	bool stale;
	bool patched;
	struct page **page;
	dma_addr_t *dma;
	struct ib_reg_wr wr;
};

/* An offer that the destination has not confirmed. */
struct rram_offered {
	bool used;
	u32 seq;
	unsigned long first;
	unsigned int pages;
	unsigned long taken[BITS_TO_LONGS(RRAM_CHUNK_PAGES)];
};

enum rram_switch_step {
	RRAM_SWITCH_NO,
	RRAM_SWITCH_WANTED,
	RRAM_SWITCH_LISTING,	/* the final set is being sent */
	RRAM_SWITCH_SENT,
	RRAM_SWITCH_DONE,
};

/**
 * struct rram_source - what only a source has
 * @nr_chunks: chunks of the file
 * @chunk: those that are registered
 * @retired: keys that were replaced
 * @nr_retired: how many
 * @nr_replaced: pages that they alone hold
 * @sg: room for mapping one chunk
 * @bad: of the chunk that is looked at, pages that can't be read
 * @known: chunks whose key the destination has
 * @want: chunks whose key it waits for
 * @lacks: after the switch: chunks of which it lacks pages
 * @hot: hottest page of a chunk, after the switch
 * @next_want: where the search in @want goes on
 * @next_key: where the search for keys to send stands
 * @next_heat: of the chunks that it looks for
 * @running: pre-copy runs
 * @begun: since when
 * @until: how long, under the session's state_lock
 * @stopped: since when no more offers are made, in jiffies; or 0
 * @precopy_us: how long it has run before
 * @stop_pages: see struct rram_precopy_args
 * @round: counts from 1
 * @pass_hot: second pass of a round
 * @pos: where it stands
 * @found: pages offered in this round
 * @seq: of the last offer
 * @offered: offers under way
 * @outstanding: bytes in them
 * @empty: the last offer had nothing to READ
 * @rate: bytes a second that the destination takes, of late
 * @rate_at: when that was last reckoned
 * @rate_bytes: bytes taken since then
 * @swtch: how far the switch is
 * @final_pos: next page of the final set
 * @final_pages: pages in it
 * @final_begun: when the switch was asked for
 * @switch_us: how long it took
 * @peer: how the destination fares, under state_lock
 */
struct rram_source {
	unsigned long nr_chunks;
	struct rram_chunk **chunk;
	struct list_head retired;
	unsigned long nr_retired;
	unsigned long nr_replaced;
	struct scatterlist *sg;
	unsigned long bad[BITS_TO_LONGS(RRAM_CHUNK_PAGES)];
	unsigned long *known;
	unsigned long *want;
	unsigned long *lacks;
	u8 *hot;
	unsigned long next_want;
	unsigned long next_key;
	int next_heat;

	bool running;
	ktime_t begun;
	ktime_t until;
	unsigned long stopped;
	u64 precopy_us;
	u64 stop_pages;
	unsigned int round;
	bool pass_hot;
	unsigned long pos;
	u64 found;
	u32 seq;
	struct rram_offered offered[RRAM_WINDOW];
	u64 outstanding;
	bool empty;
	u64 rate;
	ktime_t rate_at;
	u64 rate_bytes;

	enum rram_switch_step swtch;
	unsigned long final_pos;
	u64 final_pages;
	ktime_t final_begun;
	u64 switch_us;
	struct rram_msg_progress peer;
};

static void rram_chunk_free(struct rram_chunk *c)
{
	unsigned int i;

	/* The key first: after this nobody can READ by it. */
	if (c->mr)
		ib_dereg_mr(c->mr);
	for (i = 0; i < c->nr; i++) {
		if (c->dma && c->dma[i])
			ib_dma_unmap_page(c->s->dev, c->dma[i], PAGE_SIZE,
					  DMA_TO_DEVICE);
		if (c->page && c->page[i] && c->page[i] != ZERO_PAGE(0))
			put_page(c->page[i]);
	}
	kfree(c->dma);
	kfree(c->page);
	kfree(c);
}

/* The number of registrations under way. */
static u32 rram_registering(struct rram_session *s)
{
	return s->regs - (u32)atomic_read(&s->regs_done);
}

static void rram_reg_done(struct ib_cq *cq, struct ib_wc *wc)
{
	struct rram_chunk *c = container_of(wc->wr_cqe, struct rram_chunk, cqe);

	if (wc->status == IB_WC_SUCCESS)
		c->ready = true;
	else
		WRITE_ONCE(c->s->broken, true);
	/* All of this is there before it counts: pairs with rram_msg_push(). */
	atomic_fetch_add_release(1, &c->s->regs_done);
	rram_poke(c->s);
}

/* What is at an index now, as it is kept in rram_chunk.page. */
static struct page *rram_page_at(struct rram_file *f, unsigned long index,
				 int *err)
{
	struct folio *folio = rram_peek(f, index, err);
	struct page *page;

	if (!folio)
		return *err ? NULL : ZERO_PAGE(0);
	page = folio_file_page(folio, index);
	folio_unlock(folio);
	if (PageHWPoison(page)) {
		/* To read it is a machine check. */
		folio_put(folio);
		*err = -EHWPOISON;
		return NULL;
	}
	return page;		/* with the folio's reference */
}

/* Whether it is the page that is bad, and not the moment. */
static bool rram_is_unreadable(int err)
{
	return err == -EIO || err == -EHWPOISON;
}

static void rram_put_page(struct page *page)
{
	if (page != ZERO_PAGE(0))
		put_page(page);
}

/*
 * Registers a chunk, again if what is behind its key has changed. The work
 * request goes to the queue pair before the message that will name the key.
 */
static int rram_register(struct rram_session *s, unsigned long index)
{
	struct rram_source *src = s->src;
	struct rram_chunk *old = src->chunk[index], *c;
	unsigned int i;
	int err = -ENOMEM;

	if (old && !old->stale)
		return 0;
	/* After the switch each chunk is renewed once at most. */
	if (old && src->swtch != RRAM_SWITCH_DONE &&
	    (src->nr_retired >= RRAM_RETIRED_SHARE * src->nr_chunks ||
	     src->nr_replaced >= max_t(unsigned long, RRAM_REPLACED_MIN,
				       s->f->npages / RRAM_REPLACED_SHARE)))
		return -ENOSPC;
	c = kzalloc(sizeof(*c), GFP_KERNEL);
	if (!c)
		return -ENOMEM;
	c->s = s;
	c->first = index << RRAM_CHUNK_SHIFT;
	c->nr = min_t(unsigned long, RRAM_CHUNK_PAGES, s->f->npages - c->first);
	c->cqe.done = rram_reg_done;
	c->page = kcalloc(c->nr, sizeof(*c->page), GFP_KERNEL);
	if (!ib_uses_virt_dma(s->dev))
		c->dma = kcalloc(c->nr, sizeof(*c->dma), GFP_KERNEL);
	if (!c->page || (!c->dma && !ib_uses_virt_dma(s->dev)))
		goto free;
	sg_init_table(src->sg, c->nr);
	for (i = 0; i < c->nr; i++) {
		struct scatterlist *sg = &src->sg[i];
		u64 dma;

		c->page[i] = rram_page_at(s->f, c->first + i, &err);
		if (!c->page[i] && rram_is_unreadable(err)) {
			/*
			 * After the switch the destination is told before it
			 * has the key, and READs nothing there. Before it, no
			 * key says so.
			 */
			err = -ENOSPC;
			if (src->swtch != RRAM_SWITCH_DONE)
				goto free;
			set_bit(i, src->bad);
			c->page[i] = ZERO_PAGE(0);
			c->patched = true;
		}
		if (!c->page[i])
			goto free;
		dma = ib_dma_map_page(s->dev, c->page[i], 0, PAGE_SIZE,
				      DMA_TO_DEVICE);
		err = -EIO;
		if (ib_dma_mapping_error(s->dev, dma))
			goto free;
		if (c->dma)
			c->dma[i] = dma;
		sg_set_page(sg, c->page[i], PAGE_SIZE, 0);
		sg_dma_address(sg) = dma;
		sg_dma_len(sg) = PAGE_SIZE;
	}
	c->mr = ib_alloc_mr(s->pd, IB_MR_TYPE_MEM_REG, RRAM_CHUNK_PAGES);
	if (IS_ERR(c->mr)) {
		err = PTR_ERR(c->mr);
		c->mr = NULL;
		goto free;
	}
	trace_rram_key(s->f, c->first, c->nr, page_to_pfn(sg_page(src->sg)));
	err = ib_map_mr_sg(c->mr, src->sg, c->nr, NULL, PAGE_SIZE);
	if (err != c->nr) {
		err = err < 0 ? err : -EIO;
		goto free;
	}
	ib_update_fast_reg_key(c->mr, ib_inc_rkey(c->mr->rkey));
	c->wr.wr.wr_cqe = &c->cqe;
	c->wr.wr.opcode = IB_WR_REG_MR;
	c->wr.wr.send_flags = IB_SEND_SIGNALED;
	c->wr.mr = c->mr;
	c->wr.key = c->mr->rkey;
	c->wr.access = IB_ACCESS_REMOTE_READ;
	/* What is told of the key waits for it: see rram_msg_push(). */
	s->regs++;
	err = ib_post_send(s->link[RRAM_LINK_URGENT].id->qp, &c->wr.wr, NULL);
	if (err) {
		s->regs--;
		WRITE_ONCE(s->broken, true);
		goto free;
	}
	/* Not before: that the old one is stale has to be known until then. */
	if (old) {
		/* Freed in this order too: the old key goes before the page. */
		for (i = 0; i < c->nr; i++) {
			if (old->page[i] == c->page[i]) {
				rram_put_page(old->page[i]);
				old->page[i] = NULL;
			} else if (old->page[i] != ZERO_PAGE(0)) {
				src->nr_replaced++;
			}
		}
		list_add_tail(&old->list, &src->retired);
		src->nr_retired++;
		atomic64_inc(&s->count.keys_retired);
	}
	clear_bit(index, src->known);
	src->chunk[index] = c;
	atomic64_inc(&s->count.keys);
	return 0;
free:
	rram_chunk_free(c);
	return err;
}

/* Whether a key holds a reference to a page that is in the file. */
bool rram_key_holds(struct rram_session *s, unsigned long index,
		    struct page *page)
{
	struct rram_chunk *c;

	/* A huge page may reach beyond the end. */
	if (index >= s->f->npages)
		return false;
	c = s->src->chunk[index >> RRAM_CHUNK_SHIFT];
	return c && c->page[index % RRAM_CHUNK_PAGES] == page;
}

/* The device sees what was written since, where it doesn't look as we do. */
static void rram_sync_page(struct rram_chunk *c, unsigned int i)
{
	if (c->dma)
		ib_dma_sync_single_for_device(c->s->dev, c->dma[i], PAGE_SIZE,
					      DMA_TO_DEVICE);
}

static void rram_put_key(struct rram_session *s, struct rram_wire_key *key,
			 unsigned long index)
{
	struct rram_chunk *c = s->src->chunk[index];

	key->chunk = cpu_to_le32(index);
	key->rkey = cpu_to_le32(c ? c->mr->rkey : 0);
	key->iova = cpu_to_le64(c ? c->mr->iova : 0);
	if (c)
		set_bit(index, s->src->known);
}

static bool rram_page_is_zero(struct page *page)
{
	void *data = kmap_local_page(page);
	bool zero = !memchr_inv(data, 0, PAGE_SIZE);

	kunmap_local(data);
	return zero;
}

/*
 * Splits pages of a chunk into those that are zero, those that can't be read
 * (in src->bad), and others, and sees whether what is behind the chunk's key is
 * still what is there.
 */
static int rram_sort(struct rram_session *s, unsigned long first,
		     const unsigned long *taken, unsigned long *zero)
{
	struct rram_chunk *c = s->src->chunk[first >> RRAM_CHUNK_SHIFT];
	unsigned int i;
	int err;

	bitmap_zero(zero, RRAM_CHUNK_PAGES);
	for_each_set_bit(i, taken, RRAM_CHUNK_PAGES) {
		struct page *page = rram_page_at(s->f, first + i, &err);

		if (!page && rram_is_unreadable(err)) {
			set_bit(i, s->src->bad);
			if (c && c->page[i] != ZERO_PAGE(0))
				c->stale = true;
			continue;
		}
		if (!page)
			return err;
		if (page == ZERO_PAGE(0) || rram_page_is_zero(page))
			set_bit(i, zero);
		if (c && c->page[i] != page)
			c->stale = true;
		else if (c)
			rram_sync_page(c, i);
		rram_put_page(page);
	}
	return 0;
}

/* -- Pre-copy ------------------------------------------------------------- */

static u64 rram_window(struct rram_source *src)
{
	/* What the destination takes in 20 ms: no more to wait for at the end. */
	return clamp_t(u64, div_u64(src->rate, 50), SZ_256K, SZ_16M);
}

static struct rram_offered *rram_offer_slot(struct rram_source *src)
{
	unsigned int i;

	for (i = 0; i < RRAM_WINDOW; i++)
		if (!src->offered[i].used)
			return &src->offered[i];
	return NULL;
}

static unsigned int rram_put_runs(struct rram_wire_run *run,
				  const unsigned long *map, u16 flag)
{
	unsigned int start, end, n = 0;

	for_each_set_bitrange(start, end, map, RRAM_CHUNK_PAGES) {
		run[n].first = cpu_to_le16(start);
		run[n].nr = cpu_to_le16((end - start) | flag);
		n++;
	}
	return n;
}

/* Gives pages back that were taken for an offer. */
static void rram_give_back(struct rram_session *s, struct rram_offered *o)
{
	unsigned int i;

	for_each_set_bit(i, o->taken, RRAM_CHUNK_PAGES)
		set_bit(o->first + i, s->f->dirty);
	s->src->outstanding -= (u64)o->pages << PAGE_SHIFT;
	o->used = false;
}

/* Stops pre-copy. The state changes when the last offer is confirmed. */
static void rram_precopy_stop(struct rram_session *s)
{
	struct rram_source *src = s->src;

	if (!src->running)
		return;
	src->running = false;
	src->precopy_us += ktime_us_delta(ktime_get(), src->begun);
}

/*
 * Offers pages of the chunk at first. Returns how many of them have to be READ,
 * or -EAGAIN if it has to wait.
 */
static int rram_offer_chunk(struct rram_session *s, unsigned long first,
			    const unsigned long *mask)
{
	struct rram_source *src = s->src;
	unsigned long zero[BITS_TO_LONGS(RRAM_CHUNK_PAGES)];
	unsigned long data[BITS_TO_LONGS(RRAM_CHUNK_PAGES)];
	unsigned long index = first >> RRAM_CHUNK_SHIFT;
	struct rram_offered *o = rram_offer_slot(src);
	struct rram_msg_offer *m;
	struct rram_buf *b;
	unsigned int i, n;
	int err;

	if (!o || !rram_can_send(s) || rram_registering(s) >= RRAM_REGS_MAX)
		return -EAGAIN;
	if (!rram_harvest(s, first, mask, o->taken))
		return 0;
	/* The first round copies all, dirtied or not. */
	if (src->round > 1)
		for_each_set_bit(i, o->taken, RRAM_CHUNK_PAGES)
			s->f->heat[first + i] = rram_round_mark(src->round);
	o->used = true;
	o->first = first;
	o->pages = 0;
	bitmap_zero(src->bad, RRAM_CHUNK_PAGES);
	err = rram_sort(s, first, o->taken, zero);
	/* What can't be read stays dirty: it is for after the switch. */
	for_each_set_bit(i, src->bad, RRAM_CHUNK_PAGES)
		set_bit(first + i, s->f->dirty);
	bitmap_andnot(o->taken, o->taken, src->bad, RRAM_CHUNK_PAGES);
	bitmap_andnot(data, o->taken, zero, RRAM_CHUNK_PAGES);
	if (!err && !bitmap_empty(data, RRAM_CHUNK_PAGES))
		err = rram_register(s, index);
	if (err || bitmap_empty(o->taken, RRAM_CHUNK_PAGES)) {
		/* Nothing was promised: they are dirty as before. */
		rram_give_back(s, o);
		/*
		 * Its holes change too often, or one of its pages can't be
		 * read: it goes after the switch.
		 */
		if (!err || err == -ENOSPC)
			return 0;
		rram_fail(s, err == -ENOMEM ? RRAM_REASON_NO_MEMORY :
					      RRAM_REASON_DEVICE);
		return -EAGAIN;
	}
	o->seq = ++src->seq;
	o->pages = bitmap_weight(data, RRAM_CHUNK_PAGES);
	src->outstanding += (u64)o->pages << PAGE_SHIFT;
	src->found += bitmap_weight(o->taken, RRAM_CHUNK_PAGES);
	b = rram_msg_new(s, RRAM_MSG_OFFER);
	m = b->data;
	m->seq = cpu_to_le32(o->seq);
	if (o->pages) {
		rram_put_key(s, &m->key, index);
	} else {
		memset(&m->key, 0, sizeof(m->key));
		m->key.chunk = cpu_to_le32(index);
	}
	n = rram_put_runs(m->run, data, 0);
	n += rram_put_runs(m->run + n, zero, RRAM_RUN_ZERO);
	m->nr = cpu_to_le32(n);
	rram_msg_send(s, b, struct_size(m, run, n));
	return o->pages;
}

/* Makes offers while there is room for them. Returns true to be called again. */
static bool rram_precopy_step(struct rram_session *s)
{
	struct rram_source *src = s->src;
	struct rram_file *f = s->f;
	unsigned long mask[BITS_TO_LONGS(RRAM_CHUNK_PAGES)];
	unsigned int max;

	/* A time that is set meanwhile is seen in the next turn. */
	if (ktime_after(ktime_get(), READ_ONCE(src->until))) {
		rram_precopy_stop(s);
		return true;
	}
	while (src->outstanding < rram_window(src)) {
		struct rram_run run;
		unsigned long first, end;
		u64 bytes;
		int n;

		/*
		 * What is zero takes no bandwidth, and where some is there is
		 * more: then the next offer is of a whole chunk.
		 */
		max = src->empty ? RRAM_CHUNK_PAGES :
		      clamp_t(u64, rram_window(src) >> (PAGE_SHIFT + 2), 16,
			      RRAM_CHUNK_PAGES);
		run = rram_order_offer(f->dirty, f->heat, src->round,
				       src->pass_hot, src->pos, f->npages,
				       RRAM_CHUNK_PAGES);
		if (!run.nr) {
			src->pos = 0;
			if (!src->pass_hot) {
				src->pass_hot = true;
				continue;
			}
			src->pass_hot = false;
			/* Also when nothing was found: what was under way has arrived. */
			if (src->stop_pages &&
			    bitmap_weight(f->dirty, f->npages) +
			    (src->outstanding >> PAGE_SHIFT) <=
			    src->stop_pages) {
				rram_precopy_stop(s);
				return true;
			}
			/* A whole round without a page: look again later. */
			if (!src->found)
				return false;
			src->found = 0;
			src->round++;
			continue;
		}
		/* All of its heat in the chunk, as far as max goes. */
		first = round_down(run.first, RRAM_CHUNK_PAGES);
		end = min(first + RRAM_CHUNK_PAGES, f->npages);
		bitmap_zero(mask, RRAM_CHUNK_PAGES);
		for (;;) {
			run.nr = min(run.nr, max);
			bitmap_set(mask, run.first - first, run.nr);
			max -= run.nr;
			src->pos = run.first + run.nr;
			if (!max || src->pos >= end)
				break;
			run = rram_order_offer(f->dirty, f->heat, src->round,
					       src->pass_hot, src->pos, end,
					       RRAM_CHUNK_PAGES);
			if (!run.nr) {
				src->pos = end;
				break;
			}
		}
		bytes = (u64)bitmap_weight(mask, RRAM_CHUNK_PAGES) << PAGE_SHIFT;
		if (rram_throttled(s, bytes)) {
			src->pos = first;
			return false;
		}
		n = rram_offer_chunk(s, first, mask);
		/* What is zero, or was not offered, takes no bandwidth. */
		rram_unthrottle(s, bytes - ((u64)max(n, 0) << PAGE_SHIFT));
		if (n < 0) {
			src->pos = first;
			return false;
		}
		src->empty = !n;
	}
	return false;
}

int rram_source_precopy(struct rram_session *s, struct rram_precopy_args *a)
{
	struct rram_source *src = s->src;

	/* The thread reads these; it is told last. */
	if (a->bandwidth)
		WRITE_ONCE(s->args.bandwidth, a->bandwidth);
	src->stop_pages = a->stop_pages;
	if (!a->timeout_ms) {
		spin_lock(&s->state_lock);
		src->until = 0;
		spin_unlock(&s->state_lock);
		rram_poke(s);
		return 0;
	}
	spin_lock(&s->state_lock);
	if (s->state != RRAM_STATE_CONNECTED &&
	    s->state != RRAM_STATE_PRECOPY) {
		spin_unlock(&s->state_lock);
		return rram_switched(s->state) ? -EBUSY : -ENOTCONN;
	}
	s->state = RRAM_STATE_PRECOPY;
	src->until = ktime_add_ms(ktime_get(), a->timeout_ms);
	spin_unlock(&s->state_lock);
	wake_up_all(&s->changed);
	rram_poke(s);
	return 0;
}

/* -- Switch --------------------------------------------------------------- */

/* Begins the switch: from here on nothing may change in the file. */
static void rram_freeze(struct rram_session *s)
{
	struct rram_source *src = s->src;
	struct rram_file *f = s->f;
	unsigned int i;

	rram_precopy_stop(s);
	WRITE_ONCE(f->frozen, true);
	for (i = 0; i < RRAM_WINDOW; i++)
		if (src->offered[i].used)
			rram_give_back(s, &src->offered[i]);
	src->final_pos = 0;
	src->final_pages = 0;
	bitmap_zero(src->lacks, src->nr_chunks);
	memset(src->hot, 0, src->nr_chunks);
	bitmap_zero(f->missing, f->npages);
	src->swtch = RRAM_SWITCH_LISTING;
}

static void *rram_put_dirty(void *at, unsigned long first, unsigned int nr,
			    u8 heat, u8 flags)
{
	struct rram_wire_dirty *d = at;

	d->first = cpu_to_le32(first);
	d->nr = cpu_to_le16(nr);
	d->heat = heat;
	d->flags = flags;
	return d + 1;
}

/* Lists some pages of a chunk: as runs or as bits, what is shorter. */
static void *rram_list_pages(struct rram_session *s, void *at,
			     unsigned long first, const unsigned long *map,
			     u8 heat, u8 flags)
{
	unsigned int start, end, runs = 0, i;

	for_each_set_bitrange(start, end, map, RRAM_CHUNK_PAGES)
		runs++;
	if (runs * sizeof(struct rram_wire_dirty) <=
	    sizeof(struct rram_wire_dirty) + RRAM_CHUNK_PAGES / 8) {
		for_each_set_bitrange(start, end, map, RRAM_CHUNK_PAGES)
			at = rram_put_dirty(at, first + start, end - start,
					    heat, flags);
		return at;
	}
	at = rram_put_dirty(at, first, RRAM_CHUNK_PAGES, heat,
			    flags | RRAM_DIRTY_BITS);
	for (i = 0; i < BITS_TO_LONGS(RRAM_CHUNK_PAGES); i++)
		put_unaligned_le64(map[i], (__le64 *)at + i);
	return at + RRAM_CHUNK_PAGES / 8;
}

/* No chunk takes more than this in a message: four heats and zero, as bits. */
#define RRAM_LIST_MAX	((RRAM_HEAT_CLASSES + 1) * \
			 (sizeof(struct rram_wire_dirty) + \
			  RRAM_CHUNK_PAGES / 8))

/*
 * How hot a page of the final set is. One that was copied ahead and is in it
 * was dirtied since, if only once.
 */
static enum rram_heat rram_final_heat(struct rram_session *s,
				      unsigned long page)
{
	struct rram_source *src = s->src;
	u8 mark = s->f->heat[page];

	if (mark)
		return rram_heat_of(src->round, mark);
	return src->round > 1 || src->pass_hot || page < src->pos ?
	       RRAM_HEAT_WARM : RRAM_HEAT_COLD;
}

/*
 * Lists what the destination lacks of one chunk. A chunk without a key was
 * never looked at, and is not now: time at the switch must not grow with the
 * size of the VM. What is zero in it is found out when it gets its key.
 */
static int rram_list_chunk(struct rram_session *s, void **at,
			   unsigned long index)
{
	struct rram_source *src = s->src;
	struct rram_file *f = s->f;
	unsigned long map[BITS_TO_LONGS(RRAM_CHUNK_PAGES)] = {};
	unsigned long zero[BITS_TO_LONGS(RRAM_CHUNK_PAGES)] = {};
	unsigned long part[BITS_TO_LONGS(RRAM_CHUNK_PAGES)];
	unsigned long first = index << RRAM_CHUNK_SHIFT;
	struct rram_chunk *c = src->chunk[index];
	unsigned int heat, i, nr = min(f->npages - first, RRAM_CHUNK_PAGES);
	u8 rekey = 0;

	bitmap_copy(map, f->dirty + first / BITS_PER_LONG, nr);
	if (c) {
		for_each_set_bit(i, map, nr) {
			int err;
			struct page *page = rram_page_at(f, first + i, &err);

			if (!page && rram_is_unreadable(err)) {
				/* To be told of before there is a new key. */
				c->stale = true;
				continue;
			}
			if (!page)
				return err;
			if (page == ZERO_PAGE(0))
				set_bit(i, zero);
			if (c->page[i] != page)
				c->stale = true;
			else
				rram_sync_page(c, i);
			rram_put_page(page);
		}
		bitmap_andnot(map, map, zero, RRAM_CHUNK_PAGES);
		/* From now on a write is an error: let it be noticed. */
		rram_protect(f, first, nr);
		if (c->stale) {
			clear_bit(index, src->known);
			rekey = RRAM_DIRTY_REKEY;
		}
	}
	for (heat = 0; heat < RRAM_HEAT_CLASSES; heat++) {
		bitmap_zero(part, RRAM_CHUNK_PAGES);
		for_each_set_bit(i, map, nr)
			if (rram_final_heat(s, first + i) == heat)
				set_bit(i, part);
		if (bitmap_empty(part, RRAM_CHUNK_PAGES))
			continue;
		*at = rram_list_pages(s, *at, first, part, heat, rekey);
		src->hot[index] = heat;
	}
	if (!bitmap_empty(zero, RRAM_CHUNK_PAGES))
		*at = rram_list_pages(s, *at, first, zero, 0, RRAM_DIRTY_ZERO);
	if (!bitmap_empty(map, RRAM_CHUNK_PAGES)) {
		src->final_pages += bitmap_weight(map, RRAM_CHUNK_PAGES);
		set_bit(index, src->lacks);
		for (i = 0; i < BITS_TO_LONGS(nr); i++)
			f->missing[first / BITS_PER_LONG + i] = map[i];
	}
	return 0;
}

/* The length of a run of chunks from @index that are alike: whole, no key. */
static unsigned long rram_list_whole(struct rram_session *s,
				     unsigned long index)
{
	struct rram_file *f = s->f;
	unsigned long first = index << RRAM_CHUNK_SHIFT, n = 0;
	unsigned long end;

	while (index + n < s->src->nr_chunks && !s->src->chunk[index + n] &&
	       n < U16_MAX / RRAM_CHUNK_PAGES) {
		end = min(first + (n + 1) * RRAM_CHUNK_PAGES, f->npages);
		if (find_next_zero_bit(f->dirty, end,
				       first + n * RRAM_CHUNK_PAGES) < end)
			break;
		n++;
	}
	return n;
}

/* Sends entries, which end where @at is. */
static void rram_send_dirty(struct rram_session *s, struct rram_buf *b, void *at)
{
	struct rram_msg_dirty *m = b->data;
	void *end = m->entry;
	unsigned int n;

	/* Counted by walking them: their lengths differ. */
	for (n = 0; end < at; n++) {
		struct rram_wire_dirty *d = end;

		end = d + 1;
		if (d->flags & RRAM_DIRTY_BITS)
			end += le16_to_cpu(d->nr) / 8;
	}
	m->nr = cpu_to_le32(n);
	rram_msg_send(s, b, at - b->data);
}

/* Sends a part of the final set. Returns true to be called again at once. */
static bool rram_list_step(struct rram_session *s)
{
	struct rram_source *src = s->src;
	struct rram_file *f = s->f;
	struct rram_msg_dirty *m;
	struct rram_buf *b;
	void *at, *end;
	int err = 0;

	if (!rram_can_send(s))
		return false;
	b = rram_msg_new(s, RRAM_MSG_DIRTY);
	m = b->data;
	at = m->entry;
	end = b->data + RRAM_MSG_SIZE - RRAM_LIST_MAX;
	while (at <= end) {
		unsigned long index, whole, pages;

		src->final_pos = find_next_bit(f->dirty, f->npages,
					       src->final_pos);
		if (src->final_pos >= f->npages)
			break;
		index = src->final_pos >> RRAM_CHUNK_SHIFT;
		whole = rram_list_whole(s, index);
		if (whole) {
			src->final_pos = index << RRAM_CHUNK_SHIFT;
			pages = min(whole << RRAM_CHUNK_SHIFT,
				    f->npages - src->final_pos);
			at = rram_put_dirty(at, src->final_pos, pages,
					    RRAM_HEAT_COLD, 0);
			bitmap_set(f->missing, src->final_pos, pages);
			bitmap_set(src->lacks, index, whole);
			src->final_pages += pages;
			index += whole;
		} else {
			err = rram_list_chunk(s, &at, index);
			if (err)
				break;
			index++;
		}
		src->final_pos = min(index << RRAM_CHUNK_SHIFT, f->npages);
	}
	rram_send_dirty(s, b, at);
	if (err) {
		rram_fail(s, RRAM_REASON_NO_MEMORY);
		return false;
	}
	if (src->final_pos >= f->npages)
		src->swtch = RRAM_SWITCH_SENT;
	return true;
}

static bool rram_switch_step(struct rram_session *s)
{
	struct rram_source *src = s->src;
	struct rram_msg_switch *m;
	struct rram_buf *b;

	switch (src->swtch) {
	case RRAM_SWITCH_WANTED:
		rram_freeze(s);
		fallthrough;
	case RRAM_SWITCH_LISTING:
		if (!rram_list_step(s))
			return false;
		if (src->swtch != RRAM_SWITCH_SENT)
			return true;
		fallthrough;
	case RRAM_SWITCH_SENT:
		if (!rram_can_send(s))
			return false;
		b = rram_msg_new(s, RRAM_MSG_SWITCH);
		m = b->data;
		m->pages = cpu_to_le64(src->final_pages);
		rram_msg_send(s, b, sizeof(*m));
		src->swtch = RRAM_SWITCH_DONE;
		return false;
	default:
		return false;
	}
}

int rram_source_switch(struct rram_session *s, struct rram_switch_args *a)
{
	unsigned int ms = a->timeout_ms ?: 10 * MSEC_PER_SEC;
	struct rram_source *src = s->src;
	enum rram_state state;
	enum rram_reason reason;
	int err;

	spin_lock(&s->state_lock);
	if (s->state != RRAM_STATE_CONNECTED &&
	    s->state != RRAM_STATE_PRECOPY) {
		spin_unlock(&s->state_lock);
		return -ENOTCONN;
	}
	s->state = RRAM_STATE_SWITCHING;
	src->final_begun = ktime_get();
	src->swtch = RRAM_SWITCH_WANTED;
	spin_unlock(&s->state_lock);
	wake_up_all(&s->changed);
	rram_poke(s);
	err = rram_wait_state(s, BIT(RRAM_STATE_POSTCOPY) |
				 BIT(RRAM_STATE_RECONNECTING), ms);
	spin_lock(&s->state_lock);
	/* Decide under the lock: the answer may come at this moment. */
	if (s->state == RRAM_STATE_SWITCHING) {
		s->state = RRAM_STATE_FAILED;
		s->reason = err == -EINTR ? RRAM_REASON_ABORTED :
					    RRAM_REASON_TIMEOUT;
	}
	state = s->state;
	reason = s->reason;
	spin_unlock(&s->state_lock);
	a->dirty_pages = src->final_pages;
	a->duration_us = src->switch_us;
	if (rram_switched(state) || state == RRAM_STATE_COMPLETE)
		return 0;
	a->reason = reason;
	wake_up_all(&s->changed);
	rram_poke(s);
	/* The VM goes on when this returns: by then the file is as it was. */
	wait_event_killable(s->changed, smp_load_acquire(&s->over));
	if (reason == RRAM_REASON_TIMEOUT)
		return -ETIMEDOUT;
	return reason == RRAM_REASON_ABORTED ? -ECANCELED : -ECONNRESET;
}

/* -- After the switch ----------------------------------------------------- */

/* A chunk whose key should go next: wanted, else one that is lacking. */
static long rram_next_key(struct rram_source *src)
{
	unsigned long index = find_next_bit(src->want, src->nr_chunks,
					    src->next_want);

	/* Round and round: one that fails must not keep the others waiting. */
	if (index >= src->nr_chunks)
		index = find_first_bit(src->want, src->nr_chunks);
	if (index < src->nr_chunks)
		return index;
	for (; src->next_heat >= 0; src->next_heat--) {
		for_each_set_bit_from(src->next_key, src->lacks, src->nr_chunks)
			if (!test_bit(src->next_key, src->known) &&
			    src->hot[src->next_key] >= src->next_heat)
				return src->next_key;
		src->next_key = 0;
	}
	return -1;
}

/*
 * Gives out the key of a chunk, and before it says which of the pages that
 * the destination lacks are zero, and which can't be read here.
 */
static bool rram_key_step(struct rram_session *s)
{
	struct rram_source *src = s->src;
	struct rram_file *f = s->f;
	unsigned long map[BITS_TO_LONGS(RRAM_CHUNK_PAGES)] = {};
	unsigned long zero[BITS_TO_LONGS(RRAM_CHUNK_PAGES)];
	struct rram_msg_dirty *d;
	struct rram_msg_key *k;
	unsigned long first;
	struct rram_buf *b;
	void *at;
	long index;
	int err;

	if (!rram_can_send(s) || s->credits < 4 ||
	    rram_registering(s) >= RRAM_REGS_MAX)
		return false;
	index = rram_next_key(src);
	if (index < 0)
		return false;
	first = index << RRAM_CHUNK_SHIFT;
	bitmap_copy(map, f->missing + first / BITS_PER_LONG,
		    min(f->npages - first, RRAM_CHUNK_PAGES));
	/* Zero pages of a chunk that had a key were named before. */
	bitmap_zero(zero, RRAM_CHUNK_PAGES);
	bitmap_zero(src->bad, RRAM_CHUNK_PAGES);
	err = src->chunk[index] && !src->chunk[index]->stale ? 0 :
	      rram_sort(s, first, map, zero);
	if (!err)
		err = rram_register(s, index);
	rram_protect(f, first, min(f->npages - first, RRAM_CHUNK_PAGES));
	if (err) {
		/* First the others; later again, when somebody wants it. */
		src->next_want = index + 1;
		if (src->next_key == index)
			src->next_key++;
		pr_warn_ratelimited("remote_ram: no key for chunk %ld: %d\n",
				    index, err);
		return false;
	}
	if (!bitmap_empty(zero, RRAM_CHUNK_PAGES) ||
	    !bitmap_empty(src->bad, RRAM_CHUNK_PAGES)) {
		b = rram_msg_new(s, RRAM_MSG_DIRTY);
		d = b->data;
		at = rram_list_pages(s, d->entry, first, zero, 0,
				     RRAM_DIRTY_ZERO);
		/* On each connection that a key is sent on: see rram_chunk. */
		at = rram_list_pages(s, at, first, src->bad, 0,
				     RRAM_DIRTY_LOST);
		rram_send_dirty(s, b, at);
		bitmap_andnot(map, map, zero, RRAM_CHUNK_PAGES);
		bitmap_and(zero, map, src->bad, RRAM_CHUNK_PAGES);
		atomic64_add(bitmap_weight(zero, RRAM_CHUNK_PAGES),
			     &s->count.pages_lost);
		bitmap_andnot(map, map, src->bad, RRAM_CHUNK_PAGES);
		bitmap_copy(f->missing + first / BITS_PER_LONG, map,
			    round_up(min(f->npages - first, RRAM_CHUNK_PAGES),
				     BITS_PER_LONG));
		if (!rram_can_send(s))
			return false;
	}
	b = rram_msg_new(s, RRAM_MSG_KEY);
	k = b->data;
	k->nr = cpu_to_le32(1);
	rram_put_key(s, &k->key[0], index);
	clear_bit(index, src->want);
	rram_msg_send(s, b, struct_size(k, key, 1));
	return true;
}

/* Whether keys are due: after the switch, or because they are wanted. */
static bool rram_keys_due(struct rram_session *s)
{
	return s->src->swtch == RRAM_SWITCH_DONE &&
	       rram_switched(rram_get_state(s, NULL));
}

static void rram_measure(struct rram_source *src, u64 bytes)
{
	ktime_t now = ktime_get();
	s64 us = ktime_us_delta(now, src->rate_at);

	src->rate_bytes += bytes;
	if (us < 100 * USEC_PER_MSEC)
		return;
	src->rate = (src->rate + 3 * div64_u64(src->rate_bytes * USEC_PER_SEC,
					       us)) / 4;
	src->rate_bytes = 0;
	src->rate_at = now;
}

static bool rram_pulled(struct rram_session *s, u32 seq)
{
	struct rram_source *src = s->src;
	unsigned int i;

	for (i = 0; i < RRAM_WINDOW; i++) {
		struct rram_offered *o = &src->offered[i];
		unsigned int all;

		if (!o->used || o->seq != seq)
			continue;
		all = bitmap_weight(o->taken, RRAM_CHUNK_PAGES);
		atomic64_add(o->pages, &s->count.pages_ahead);
		atomic64_add(all - o->pages, &s->count.pages_zero);
		atomic64_add((u64)o->pages << PAGE_SHIFT,
			     &s->count.bytes_ahead);
		src->outstanding -= (u64)o->pages << PAGE_SHIFT;
		rram_measure(src, (u64)o->pages << PAGE_SHIFT);
		o->used = false;
		return true;
	}
	/* After the switch has begun all offers count as not taken. */
	return src->swtch != RRAM_SWITCH_NO;
}

/* Deals with a message. Returns false if the session can't go on. */
bool rram_source_message(struct rram_session *s, struct rram_buf *b)
{
	struct rram_source *src = s->src;
	struct rram_msg *msg = b->data;
	unsigned int i, n;

	switch (msg->type) {
	case RRAM_MSG_PULLED: {
		struct rram_msg_pulled *m = b->data;

		return b->bytes == sizeof(*m) &&
		       rram_pulled(s, le32_to_cpu(m->seq));
	}
	case RRAM_MSG_SWITCHED: {
		struct rram_msg_switch *m = b->data;

		if (b->bytes != sizeof(*m) || src->swtch != RRAM_SWITCH_DONE ||
		    le64_to_cpu(m->pages) != src->final_pages)
			return false;
		src->switch_us = ktime_us_delta(ktime_get(), src->final_begun);
		rram_set_state(s, RRAM_STATE_POSTCOPY, RRAM_REASON_NONE);
		return true;
	}
	case RRAM_MSG_WANT: {
		struct rram_msg_want *m = b->data;

		if (b->bytes < sizeof(*m))
			return false;
		n = le32_to_cpu(m->nr);
		if (n > RRAM_MSG_SIZE / 4 || b->bytes != struct_size(m, chunk, n))
			return false;
		for (i = 0; i < n; i++) {
			u32 index = le32_to_cpu(m->chunk[i]);

			if (index >= src->nr_chunks)
				return false;
			set_bit(index, src->want);
		}
		return true;
	}
	case RRAM_MSG_PROGRESS:
		if (b->bytes != sizeof(struct rram_msg_progress))
			return false;
		spin_lock(&s->state_lock);
		memcpy(&src->peer, b->data, sizeof(src->peer));
		spin_unlock(&s->state_lock);
		return true;
	case RRAM_MSG_COMPLETE:
		if (!rram_switched(s->state))
			return false;
		rram_say(s, RRAM_MSG_BYE);
		rram_set_state(s, RRAM_STATE_COMPLETE, RRAM_REASON_NONE);
		return false;
	default:
		return false;
	}
}

/*
 * Whether pre-copy that makes no more offers has ended: those that it made are
 * settled, or have not been for as long as a peer may be silent. The switch
 * counts them as not taken.
 */
static bool rram_precopy_over(struct rram_session *s)
{
	struct rram_source *src = s->src;
	unsigned int i;

	if (time_after(jiffies, src->stopped +
				msecs_to_jiffies(s->args.dead_ms)))
		return true;
	/* Offers of nothing but zeroes count no bytes. */
	for (i = 0; i < RRAM_WINDOW && !src->offered[i].used; i++)
		;
	return i == RRAM_WINDOW && !src->outstanding;
}

/* One turn of the source's work. Returns true if there is more at once. */
bool rram_source_step(struct rram_session *s)
{
	struct rram_source *src = s->src;
	enum rram_state state;
	bool more = false;
	ktime_t until;

	spin_lock(&s->state_lock);
	state = s->state;
	until = src->until;
	spin_unlock(&s->state_lock);
	if (state == RRAM_STATE_PRECOPY && !src->running && until &&
	    ktime_before(ktime_get(), until)) {
		src->running = true;
		src->stopped = 0;
		src->begun = ktime_get();
		src->rate_at = src->begun;
		src->rate_bytes = 0;
	}
	if (src->swtch != RRAM_SWITCH_NO && src->swtch != RRAM_SWITCH_DONE)
		return rram_switch_step(s);
	if (src->running)
		more = rram_precopy_step(s);
	if (!src->running && state == RRAM_STATE_PRECOPY) {
		if (!src->stopped)
			src->stopped = jiffies ?: 1;
		if (rram_precopy_over(s)) {
			src->stopped = 0;
			spin_lock(&s->state_lock);
			/* Not if it has been asked to go on meanwhile. */
			if (s->state == RRAM_STATE_PRECOPY &&
			    src->until == until) {
				src->until = 0;
				s->state = RRAM_STATE_CONNECTED;
			}
			spin_unlock(&s->state_lock);
			wake_up_all(&s->changed);
		}
	}
	if (rram_keys_due(s) ||
	    !bitmap_empty(src->want, src->nr_chunks))
		more |= rram_key_step(s);
	return more;
}

void rram_source_linked(struct rram_session *s)
{
	struct rram_source *src = s->src;
	struct rram_file *f = s->f;

	/* The peer has forgotten all keys, and may ask again. */
	bitmap_zero(src->known, src->nr_chunks);
	bitmap_zero(src->want, src->nr_chunks);
	src->next_key = 0;
	src->next_heat = RRAM_HEAT_CLASSES - 1;
	if (s->epoch == 1 || !READ_ONCE(f->tracking)) {
		bitmap_set(f->dirty, 0, f->npages);
		/* All is dirty, and then all is tracked: never the other way. */
		smp_wmb();
		WRITE_ONCE(f->tracking, true);
	}
}

/* The connection is down: what was retired for its sake can go. */
void rram_source_unlinked(struct rram_session *s)
{
	struct rram_source *src = s->src;
	struct rram_chunk *c, *next;
	unsigned long i;

	list_for_each_entry_safe(c, next, &src->retired, list) {
		list_del(&c->list);
		rram_chunk_free(c);
	}
	src->nr_retired = 0;
	src->nr_replaced = 0;
	for (i = 0; i < src->nr_chunks; i++) {
		c = src->chunk[i];
		/* The next connection has to be told what a key hides. */
		if (c && (!c->ready || c->patched)) {
			src->chunk[i] = NULL;
			rram_chunk_free(c);
		}
	}
}

/* Gives up all keys and the pages behind them. There is no connection. */
void rram_source_drop(struct rram_session *s)
{
	struct rram_source *src = s->src;
	enum rram_state state = rram_get_state(s, NULL);
	unsigned long i;

	rram_source_unlinked(s);
	for (i = 0; i < src->nr_chunks; i++) {
		if (!src->chunk[i])
			continue;
		rram_chunk_free(src->chunk[i]);
		src->chunk[i] = NULL;
	}
	if (rram_switched(state))
		return;		/* another device will serve them */
	WRITE_ONCE(s->f->tracking, false);
	/* A VM that did not leave goes on. */
	if (state == RRAM_STATE_FAILED)
		WRITE_ONCE(s->f->frozen, false);
}

int rram_source_new(struct rram_session *s)
{
	struct rram_source *src = kzalloc(sizeof(*src), GFP_KERNEL);
	unsigned long n = DIV_ROUND_UP(s->f->npages, RRAM_CHUNK_PAGES);

	if (!src)
		return -ENOMEM;
	s->src = src;
	s->state = RRAM_STATE_CONNECTING;
	INIT_LIST_HEAD(&src->retired);
	src->nr_chunks = n;
	src->round = 1;
	src->chunk = kvcalloc(n, sizeof(*src->chunk), GFP_KERNEL);
	src->sg = kcalloc(RRAM_CHUNK_PAGES, sizeof(*src->sg), GFP_KERNEL);
	src->known = kvcalloc(BITS_TO_LONGS(n), sizeof(long), GFP_KERNEL);
	src->want = kvcalloc(BITS_TO_LONGS(n), sizeof(long), GFP_KERNEL);
	src->lacks = kvcalloc(BITS_TO_LONGS(n), sizeof(long), GFP_KERNEL);
	src->hot = kvzalloc(n, GFP_KERNEL);
	if (!src->chunk || !src->sg || !src->known || !src->want ||
	    !src->lacks || !src->hot)
		return -ENOMEM;
	memset(s->f->heat, 0, s->f->npages);
	/* What a destination of before lacked is nobody's business now. */
	bitmap_zero(s->f->missing, s->f->npages);
	atomic64_set(&s->f->late_writes, 0);
	return 0;
}

void rram_source_free(struct rram_session *s)
{
	struct rram_source *src = s->src;

	if (!src)
		return;
	kvfree(src->chunk);
	kfree(src->sg);
	kvfree(src->known);
	kvfree(src->want);
	kvfree(src->lacks);
	kvfree(src->hot);
	kfree(src);
}

/* What the destination said last. */
static void rram_peer_stats(struct rram_session *s, struct rram_stats *st)
{
	struct rram_msg_progress *m = &s->src->peer;
	unsigned int i;

	spin_lock(&s->state_lock);
	/* Before it has said anything, it has nothing. */
	st->pages_missing = m->msg.type ? le64_to_cpu(m->missing) :
					  s->src->final_pages;
	st->pages_demand = le64_to_cpu(m->demand);
	st->pages_bubble = le64_to_cpu(m->bubble);
	st->pages_background = le64_to_cpu(m->background);
	st->bytes_after = le64_to_cpu(m->bytes_after);
	st->faults_nowait = le64_to_cpu(m->nowait);
	st->faults_retry = le64_to_cpu(m->retry);
	st->faults_plain = le64_to_cpu(m->plain);
	st->faults_joined = le64_to_cpu(m->joined);
	st->wait_ns_total = le64_to_cpu(m->wait_ns_total);
	st->wait_ns_max = le64_to_cpu(m->wait_ns_max);
	st->read_ns_total = le64_to_cpu(m->read_ns_total);
	st->rate = le64_to_cpu(m->rate);
	for (i = 0; i < RRAM_HIST_BUCKETS; i++) {
		st->wait_hist[i] = le64_to_cpu(m->wait_hist[i]);
		st->read_hist[i] = le64_to_cpu(m->read_hist[i]);
	}
	spin_unlock(&s->state_lock);
}

void rram_source_stats(struct rram_session *s, struct rram_stats *st)
{
	struct rram_source *src = s->src;
	u64 left;

	st->rounds = src->round;
	st->pages_dirty = src->swtch == RRAM_SWITCH_NO ?
		bitmap_weight(s->f->dirty, s->f->npages) +
		(src->outstanding >> PAGE_SHIFT) : src->final_pages;
	st->late_writes = atomic64_read(&s->f->late_writes);
	st->switch_us = src->switch_us;
	st->precopy_us = src->precopy_us +
		(src->running ? ktime_us_delta(ktime_get(), src->begun) : 0);
	st->rate = src->rate;
	if (src->swtch == RRAM_SWITCH_DONE)
		rram_peer_stats(s, st);
	left = (src->swtch == RRAM_SWITCH_DONE ? st->pages_missing :
						 st->pages_dirty) << PAGE_SHIFT;
	st->remaining_us = st->rate ?
		div64_u64(left * USEC_PER_SEC, st->rate) : ~0ULL;
	st->memory = src->nr_chunks * (sizeof(void *) + 1) +
		(st->keys - st->keys_retired + src->nr_retired) *
		(sizeof(struct rram_chunk) + RRAM_CHUNK_PAGES *
		 (sizeof(struct page *) +
		  (READ_ONCE(s->virt_dma) ? 0 : sizeof(dma_addr_t))));
}

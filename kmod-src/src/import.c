// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * The destination: READs pages into the very folios that the guest maps.
 *
 * Whoever wants a page first takes its bit in rram_file.inflight. The folio is
 * locked and not up to date until the READ has ended, which keeps shmem, fault-
 * around and reclaim away from it. The completion marks it up to date, clears
 * the missing bit, then the inflight bit, unlocks the folio, and wakes those
 * who wait: in this order, so that who sees the missing bit clear finds a page
 * that is whole.
 */
#include <linux/memcontrol.h>
#include <linux/pagemap.h>
#include <linux/sched/mm.h>
#include <linux/shmem_fs.h>

#include "remote_ram.h"
#include "trace.h"

/* An OFFER, while its pages are READ. */
struct rram_offer {
	struct list_head list;
	u32 seq;
	unsigned long first;	/* of the chunk */
	unsigned int nr;	/* runs */
	unsigned int next;	/* run to go on with */
	unsigned int at;	/* page in it */
	atomic_t pending;	/* READs under way, and one while more may come */
	bool failed;
	struct rram_wire_run run[];
};

/* How to READ a chunk. */
struct rram_key {
	u64 iova;
	u32 rkey;
	bool valid;
};

/**
 * struct rram_dest - what only a destination has
 * @nr_chunks: chunks of the file
 * @key: how to READ each
 * @key_lock: @key, against faults
 * @want: chunks whose key somebody waits for
 * @asked: chunks for which it was asked
 * @memcg: who pays for pages that nobody has faulted on
 * @offers: OFFERs that are not through, oldest first
 * @done: OFFERs to confirm, under @fetch_lock
 * @nr_offers: OFFERs in both lists, or between them
 * @short_since: since when there is no room for pages ahead, in jiffies; or 0
 * @stuck: chunk whose key has to come first, and is waited for
 * @stuck_since: since when
 * @fetch_lock: @urgent, @bulk, @queue, @done
 * @urgent: READs of one page that are free
 * @queue: those who wait for one, in order; empty if there are any
 * @bulk: READs of several that are free
 * @fetches: all of both
 * @active: READs under way
 * @freezing: the final set has begun to arrive
 * @listed: pages in the final set so far
 * @answered: the source was told that the final set is in
 * @order: in which order the rest is pulled
 * @order_lock: @order, against faults
 * @demand: demand READs under way
 * @told_at: when the source was last told how things stand
 * @looked_at: when READs were last looked at that take too long
 * @said: it was told on this connection that all is in
 * @bye: the source knows that all is in
 * @ended_at: when all was in
 * @rate: bytes a second of late
 * @rate_at: when that was last reckoned
 * @rate_bytes: bytes that have come since
 * @switch_us: how long applying the final set took
 * @switch_begun: since when it is applied
 */
struct rram_dest {
	unsigned long nr_chunks;
	struct rram_key *key;
	spinlock_t key_lock;	/* key, against faults */
	unsigned long *want;
	unsigned long *asked;
	struct mem_cgroup *memcg;
	struct list_head offers;
	struct list_head done;
	unsigned int nr_offers;
	unsigned long short_since;
	unsigned long stuck;
	unsigned long stuck_since;
	spinlock_t fetch_lock;	/* urgent, bulk, queue, done */
	struct list_head urgent;
	struct list_head queue;
	struct list_head bulk;
	struct rram_fetch *fetches;
	atomic_t active;
	bool freezing;
	u64 listed;
	bool answered;
	struct rram_order order;
	spinlock_t order_lock;	/* order, against faults */
	atomic_t demand;
	unsigned long told_at;
	unsigned long looked_at;
	bool said;
	bool bye;
	unsigned long ended_at;
	u64 rate;
	ktime_t rate_at;
	atomic64_t rate_bytes;
	u64 switch_us;
	ktime_t switch_begun;
};

/* -- READs ---------------------------------------------------------------- */

static void rram_offer_put(struct rram_session *s, struct rram_offer *o)
{
	struct rram_dest *dst = s->dst;
	unsigned long flags;

	if (!atomic_dec_and_test(&o->pending))
		return;
	spin_lock_irqsave(&dst->fetch_lock, flags);
	list_add_tail(&o->list, &dst->done);
	spin_unlock_irqrestore(&dst->fetch_lock, flags);
	rram_poke(s);
}

/*
 * A READ that is free. If there is none, whoever has a place waits for one in
 * the queue.
 */
static struct rram_fetch *rram_fetch_get(struct rram_session *s, bool bulk,
					 struct rram_place *p)
{
	struct rram_dest *dst = s->dst;
	struct rram_fetch *r;
	unsigned long flags;

	spin_lock_irqsave(&dst->fetch_lock, flags);
	if (p && p->fetch) {
		r = p->fetch;
		p->fetch = NULL;
		p->taken = false;
	} else {
		r = list_first_entry_or_null(bulk ? &dst->bulk : &dst->urgent,
					     struct rram_fetch, list);
		if (r) {
			list_del(&r->list);
		} else if (p && !p->taken) {
			list_add_tail(&p->list, &dst->queue);
			p->taken = true;
		}
	}
	spin_unlock_irqrestore(&dst->fetch_lock, flags);
	return r;
}

/* Gives a READ to the first in the queue, and wakes nobody else. */
static void rram_fetch_put(struct rram_fetch *r)
{
	struct rram_session *s = r->s;
	struct rram_dest *dst = s->dst;
	struct rram_place *p = NULL;
	unsigned long flags, index;

	spin_lock_irqsave(&dst->fetch_lock, flags);
	if (!r->bulk)
		p = list_first_entry_or_null(&dst->queue, struct rram_place,
					     list);
	if (p) {
		list_del_init(&p->list);
		p->fetch = r;
		index = p->index;
	} else {
		list_add(&r->list, r->bulk ? &dst->bulk : &dst->urgent);
	}
	spin_unlock_irqrestore(&dst->fetch_lock, flags);
	/* From here on p may be gone, and r under way again. */
	if (p)
		rram_wake_page(s->f, index);
}

/**
 * rram_place_leave - give up a place in the queue
 * @s: a destination's session
 * @p: the place
 *
 * A READ that was handed over meanwhile goes to the next in the queue.
 */
void rram_place_leave(struct rram_session *s, struct rram_place *p)
{
	struct rram_dest *dst = s->dst;
	struct rram_fetch *r;
	unsigned long flags;

	if (!p->taken)
		return;
	spin_lock_irqsave(&dst->fetch_lock, flags);
	list_del_init(&p->list);
	r = p->fetch;
	p->fetch = NULL;
	p->taken = false;
	spin_unlock_irqrestore(&dst->fetch_lock, flags);
	if (r)
		rram_fetch_put(r);
}

/* Lets go of a page that was taken and not READ. */
static void rram_untake(struct rram_file *f, unsigned long index)
{
	clear_bit_unlock(index, f->inflight);
	rram_wake_page(f, index);
}

/*
 * A page has come, or will not come by this READ. May run in a soft
 * interrupt.
 */
static void rram_settle(struct rram_session *s, struct folio *folio,
			unsigned long index, enum rram_cause cause, bool came)
{
	struct rram_file *f = s->f;

	if (came) {
		folio_mark_uptodate(folio);
		/* A clean shmem folio may be dropped. */
		folio_mark_dirty(folio);
		if (test_and_clear_bit(index, f->missing))
			atomic_long_dec(&f->nr_missing);
	}
	clear_bit_unlock(index, f->inflight);
	folio_unlock(folio);
	rram_wake_page(f, index);
	folio_put(folio);
}

static void rram_count_fetch(struct rram_session *s, enum rram_cause cause,
			     unsigned int nr)
{
	struct rram_counters *c = &s->count;
	u64 bytes = (u64)nr << PAGE_SHIFT;

	switch (cause) {
	case RRAM_CAUSE_AHEAD:
		atomic64_add(nr, &c->pages_ahead);
		break;
	case RRAM_CAUSE_DEMAND:
		atomic64_add(nr, &c->pages_demand);
		break;
	case RRAM_CAUSE_BUBBLE:
		atomic64_add(nr, &c->pages_bubble);
		break;
	case RRAM_CAUSE_BACKGROUND:
		atomic64_add(nr, &c->pages_background);
		break;
	}
	atomic64_add(bytes, READ_ONCE(s->f->phase) == RRAM_PHASE_AHEAD ?
			    &c->bytes_ahead : &c->bytes_after);
	atomic64_add(bytes, &s->dst->rate_bytes);
}

static void rram_fetch_done(struct ib_cq *cq, struct ib_wc *wc)
{
	struct rram_fetch *r = container_of(wc->wr_cqe, struct rram_fetch, cqe);
	struct rram_session *s = r->s;
	struct rram_dest *dst = s->dst;
	bool came = wc->status == IB_WC_SUCCESS;
	struct rram_offer *offer = r->offer;
	enum rram_cause cause = r->cause;
	unsigned int i;
	u64 ns;

	/*
	 * siw completes a READ twice if its queue pair ends when it is queued
	 * for sending: it is on two of siw's lists by then.
	 */
	if (!xchg(&r->under_way, false))
		return;
	if (r->by_rw)
		rdma_rw_ctx_destroy(&r->rw, wc->qp, wc->qp->port, r->sg, r->nr,
				    DMA_FROM_DEVICE);
	else
		ib_dma_unmap_page(s->dev, r->sge.addr, PAGE_SIZE,
				  DMA_FROM_DEVICE);
	if (came && unlikely(rram_inject_failure()))
		came = false;
	ns = ktime_to_ns(ktime_sub(ktime_get(), r->posted));
	if (came) {
		rram_count_fetch(s, cause, r->nr);
		if (cause == RRAM_CAUSE_DEMAND) {
			atomic64_add(ns, &s->count.read_ns_total);
			rram_count_hist(s->count.read_hist, ns);
		}
	} else {
		if (offer)
			WRITE_ONCE(offer->failed, true);
		WRITE_ONCE(s->broken, true);
	}
	trace_rram_read(s->f, r->first, r->nr, cause, ns, wc->status);
	for (i = 0; i < r->nr; i++)
		rram_settle(s, r->folio[i], r->first + i, cause, came);
	if (cause == RRAM_CAUSE_DEMAND)
		atomic_dec(&dst->demand);
	rram_fetch_put(r);
	if (offer)
		rram_offer_put(s, offer);
	/* The last that is touched: who waits for none to be active may go. */
	if (atomic_dec_and_test(&dst->active) || cause != RRAM_CAUSE_DEMAND ||
	    !came || !rram_lacking(s->f))
		rram_poke(s);
}

/*
 * Posts a READ of pages that were taken and whose folios are in r->folio.
 * The caller holds s->linksem for reading, or is the thread.
 */
static int rram_post_read(struct rram_session *s, struct rram_fetch *r,
			  const struct rram_key *key)
{
	struct rram_link *l = &s->link[r->bulk ? RRAM_LINK_BULK :
						 RRAM_LINK_URGENT];
	u64 addr = key->iova +
		   ((r->first & (RRAM_CHUNK_PAGES - 1)) << PAGE_SHIFT);
	struct ib_qp *qp = l->id->qp;
	unsigned int i;
	int err;

	r->cqe.done = rram_fetch_done;
	r->posted = ktime_get();
	r->by_rw = r->bulk || l->sink_keys;
	atomic_inc(&s->dst->active);
	WRITE_ONCE(r->under_way, true);
	if (r->by_rw) {
		sg_init_table(r->sg, r->nr);
		for (i = 0; i < r->nr; i++)
			sg_set_folio(&r->sg[i], r->folio[i], PAGE_SIZE, 0);
		trace_rram_sink(s->f, r->first, r->nr,
				page_to_pfn(sg_page(r->sg)));
		err = rdma_rw_ctx_init(&r->rw, qp, qp->port, r->sg, r->nr, 0,
				       addr, key->rkey, DMA_FROM_DEVICE);
		if (err < 0)
			goto undo;
		err = rdma_rw_ctx_post(&r->rw, qp, qp->port, &r->cqe, NULL);
		if (err)
			rdma_rw_ctx_destroy(&r->rw, qp, qp->port, r->sg, r->nr,
					    DMA_FROM_DEVICE);
	} else {
		r->sge.addr = ib_dma_map_page(s->dev, &r->folio[0]->page, 0,
					      PAGE_SIZE, DMA_FROM_DEVICE);
		err = -EIO;
		if (ib_dma_mapping_error(s->dev, r->sge.addr))
			goto undo;
		trace_rram_sink(s->f, r->first, 1, folio_pfn(r->folio[0]));
		r->sge.length = PAGE_SIZE;
		r->sge.lkey = s->pd->local_dma_lkey;
		memset(&r->wr, 0, sizeof(r->wr));
		r->wr.wr.wr_cqe = &r->cqe;
		r->wr.wr.sg_list = &r->sge;
		r->wr.wr.num_sge = 1;
		r->wr.wr.opcode = IB_WR_RDMA_READ;
		r->wr.wr.send_flags = IB_SEND_SIGNALED;
		r->wr.remote_addr = addr;
		r->wr.rkey = key->rkey;
		err = ib_post_send(qp, &r->wr.wr, NULL);
		if (err)
			ib_dma_unmap_page(s->dev, r->sge.addr, PAGE_SIZE,
					  DMA_FROM_DEVICE);
	}
	if (!err)
		return 0;
	/* A queue pair that takes no more is a connection that is lost. */
	WRITE_ONCE(s->broken, true);
	rram_poke(s);
undo:
	WRITE_ONCE(r->under_way, false);
	atomic_dec(&s->dst->active);
	return err;
}

static bool rram_get_key(struct rram_session *s, unsigned long index,
			 struct rram_key *key)
{
	struct rram_dest *dst = s->dst;

	spin_lock(&dst->key_lock);
	*key = dst->key[index >> RRAM_CHUNK_SHIFT];
	spin_unlock(&dst->key_lock);
	if (key->valid)
		return true;
	if (!test_and_set_bit(index >> RRAM_CHUNK_SHIFT, dst->want))
		rram_poke(s);
	return false;
}

/* Whether an answer of rram_demand() says that a page can't be made. */
bool rram_no_room(int err)
{
	switch (err) {
	case -ENOMEM:
	case -ENOSPC:
	case -EIO:
	case -EOPNOTSUPP:
		return true;
	default:
		return false;
	}
}

/* As rram_grab(), and says who pays for a page that is made. */
static struct folio *rram_grab_charged(struct rram_session *s,
				       unsigned long index)
{
	struct mem_cgroup *outer;
	struct folio *folio;

	if (current->mm)
		return rram_grab(s->f, index);
	/* A kernel thread on behalf of somebody else has nobody to charge. */
	outer = set_active_memcg(s->dst->memcg);
	folio = rram_grab(s->f, index);
	set_active_memcg(outer);
	return folio;
}

/*
 * Starts the READ of a page whose bit the caller has taken. What rram_no_room()
 * knows says that no page can be made, and nothing else.
 */
static int rram_demand_taken(struct rram_session *s, unsigned long index,
			     struct rram_fetch *r, const struct rram_key *key,
			     const struct rram_place *place)
{
	struct folio *folio = rram_grab_charged(s, index);
	int err;

	if (IS_ERR(folio))
		return PTR_ERR(folio);
	r->first = index;
	r->nr = 1;
	r->cause = RRAM_CAUSE_DEMAND;
	r->offer = NULL;
	r->folio[0] = folio;
	atomic_inc(&s->dst->demand);
	if (unlikely(rram_inject_delay_us))
		fsleep(rram_inject_delay_us);
	err = rram_post_read(s, r, key);
	if (!err)
		return 0;
	atomic_dec(&s->dst->demand);
	folio_unlock(folio);
	folio_put(folio);
	if (!rram_no_room(err))
		return err;
	/*
	 * The page can be made; it is the device that has no room, or fails.
	 * For a guest that is no reason to do without the page. Who waits for
	 * it tries again, and not at once.
	 */
	if (place && !READ_ONCE(s->broken))
		fsleep(USEC_PER_MSEC);
	return -EAGAIN;
}

/* rram_demand(), with the locks that it takes. */
static int rram_demand_linked(struct rram_session *s, unsigned long index,
			      struct rram_place *place)
{
	struct rram_file *f = s->f;
	struct rram_fetch *r;
	struct rram_key key;
	int err;

	/*
	 * All that may be in the way is looked at before the bit is taken:
	 * giving it back wakes those who wait for the page, and the caller is
	 * one of them.
	 */
	if (!s->linked || READ_ONCE(s->broken))
		return -ENOTCONN;
	/* What is READ by a key that is about to be void would be stale. */
	if (READ_ONCE(s->dst->freezing) && !rram_switched(READ_ONCE(s->state)))
		return -EAGAIN;
	if (!rram_get_key(s, index, &key))
		return -EAGAIN;
	if (test_bit(index, f->inflight))
		return -EINPROGRESS;
	r = rram_fetch_get(s, false, place);
	if (!r)
		return -EBUSY;
	/* Its last completion may come twice on a connection that is broken. */
	if (READ_ONCE(s->broken)) {
		rram_fetch_put(r);
		return -ENOTCONN;
	}
	if (test_and_set_bit_lock(index, f->inflight)) {
		rram_fetch_put(r);
		return -EINPROGRESS;
	}
	err = 0;
	if (test_bit(index, f->missing)) {
		err = rram_demand_taken(s, index, r, &key, place);
		if (!err)
			return -EIOCBQUEUED;
	}
	rram_untake(f, index);
	rram_fetch_put(r);
	return err;
}

/**
 * rram_demand - see to it that a page comes
 * @s: a destination's session
 * @index: the page
 * @place: of somebody who is going to wait for the page, and who calls this
 *	again or leaves; NULL if the caller does not wait
 *
 * Return: 0 when the page is here; what rram_no_room() knows, when no page can
 * be made for it; anything else: it is on its way, or can't be fetched at this
 * moment. Either way who waits is woken when there is a reason to call this
 * again.
 */
int rram_demand(struct rram_session *s, unsigned long index,
		struct rram_place *place)
{
	struct rram_file *f = s->f;
	bool ahead;
	int err;

	if (!test_bit_acquire(index, f->missing))
		return 0;
	ahead = READ_ONCE(f->phase) == RRAM_PHASE_AHEAD;
	if (ahead)
		down_read(&f->stale);
	down_read(&s->linksem);
	err = rram_demand_linked(s, index, place);
	up_read(&s->linksem);
	if (ahead)
		up_read(&f->stale);
	/* Nobody sleeps with a READ in their hands, or queues for none. */
	if (place && err != -EBUSY)
		rram_place_leave(s, place);
	return err;
}

/**
 * rram_demand_ahead - begin to fetch a page for somebody who can't wait
 * @s: a destination's session
 * @index: the page
 *
 * Who can't wait comes back as somebody who can, and then joins this READ.
 * Waits for no READ and for nobody who does, so takes no lock that it would
 * have to wait for; that a page is made may take as long as it does for any
 * page that is made under such a fault.
 *
 * Return: whether a READ was begun.
 */
bool rram_demand_ahead(struct rram_session *s, unsigned long index)
{
	struct rram_file *f = s->f;
	bool ahead = READ_ONCE(f->phase) == RRAM_PHASE_AHEAD, begun = false;

	if (ahead && !down_read_trylock(&f->stale))
		return false;
	if (down_read_trylock(&s->linksem)) {
		begun = rram_demand_linked(s, index, NULL) == -EIOCBQUEUED;
		up_read(&s->linksem);
	}
	if (ahead)
		up_read(&f->stale);
	return begun;
}

/* Somebody waits for this page: what is around it will be wanted next. */
void rram_dest_fault(struct rram_session *s, unsigned long index)
{
	struct rram_dest *dst = s->dst;

	if (READ_ONCE(s->f->phase) != RRAM_PHASE_AFTER)
		return;
	spin_lock(&dst->order_lock);
	rram_order_fault(&dst->order, index);
	spin_unlock(&dst->order_lock);
	if (READ_ONCE(s->background))
		rram_poke(s);
}

/*
 * READs up to @nr pages from @first on into one request; all in one chunk.
 * Stops before a page that somebody else has taken. Returns how many pages it
 * has dealt with, or an error when it has to wait: -ENOSPC for room.
 */
static int rram_pull(struct rram_session *s, unsigned long first,
		     unsigned int nr, enum rram_cause cause,
		     struct rram_offer *offer)
{
	struct rram_file *f = s->f;
	struct rram_fetch *r;
	struct rram_key key;
	unsigned int n = 0;
	int err = -EBUSY;

	if (!rram_get_key(s, first, &key))
		return -EAGAIN;
	r = rram_fetch_get(s, true, NULL);
	if (!r)
		return -EBUSY;
	if (READ_ONCE(s->broken)) {
		rram_fetch_put(r);
		return -ENOTCONN;
	}
	while (n < nr) {
		unsigned long index = first + n;
		struct folio *folio;

		if (test_and_set_bit_lock(index, f->inflight))
			break;
		/* After the switch only what is missing; before it, updates. */
		if (cause != RRAM_CAUSE_AHEAD && !test_bit(index, f->missing)) {
			rram_untake(f, index);
			break;
		}
		folio = rram_grab_charged(s, index);
		if (IS_ERR(folio)) {
			rram_untake(f, index);
			if (rram_no_room(PTR_ERR(folio)))
				err = -ENOSPC;
			break;
		}
		r->folio[n++] = folio;
	}
	if (!n) {
		rram_fetch_put(r);
		return err;
	}
	r->first = first;
	r->nr = n;
	r->cause = cause;
	r->offer = offer;
	if (offer)
		atomic_inc(&offer->pending);
	err = rram_post_read(s, r, &key);
	if (!err)
		return n;
	if (offer)
		atomic_dec(&offer->pending);
	while (n--) {
		clear_bit_unlock(first + n, f->inflight);
		folio_unlock(r->folio[n]);
		folio_put(r->folio[n]);
		rram_wake_page(f, first + n);
	}
	rram_fetch_put(r);
	return err;
}

/*
 * The thread waits for READs to end, its own or those of others. Nobody else
 * notices that the peer is gone meanwhile, or that the session is to end.
 */
static void rram_patience(struct rram_session *s)
{
	if (READ_ONCE(s->aborted) || READ_ONCE(s->evicted) ||
	    !rram_check_link(s))
		rram_break(s);
}

/* -- Before the switch ---------------------------------------------------- */

/* Takes a page's bit. A READ by a fault may be on its way. */
static void rram_take(struct rram_session *s, unsigned long index)
{
	struct rram_file *f = s->f;

	while (!wait_event_timeout(f->wait[index % RRAM_WAITS],
				   !test_and_set_bit_lock(index, f->inflight),
				   RRAM_TICK))
		rram_patience(s);
}

/* These pages are zero at the source. After the switch, a page at a time. */
static void rram_take_zero(struct rram_session *s, unsigned long first,
			   unsigned int nr)
{
	struct rram_file *f = s->f;
	unsigned long i;

	for (i = first; i < first + nr; i++)
		rram_take(s, i);
	/* It may have been punched out, and written, while this waited. */
	if (rram_switched(s->state) && !test_bit(first, f->missing)) {
		rram_untake(f, first);
		return;
	}
	/* A hole reads as zeroes and takes no memory. */
	shmem_truncate_range(rram_inner(f), (loff_t)first << PAGE_SHIFT,
			     ((loff_t)(first + nr) << PAGE_SHIFT) - 1);
	for (i = first; i < first + nr; i++) {
		if (test_and_clear_bit(i, f->missing))
			atomic_long_dec(&f->nr_missing);
		clear_bit_unlock(i, f->inflight);
		rram_wake_page(f, i);
	}
}

/*
 * Whether there has been no room for pages for as long as a peer may be silent.
 * Before the switch the VM had better stay where it is.
 */
static bool rram_short(struct rram_session *s)
{
	struct rram_dest *dst = s->dst;

	if (!dst->short_since)
		dst->short_since = jiffies ?: 1;
	return time_after(jiffies, dst->short_since +
				   msecs_to_jiffies(s->args.dead_ms));
}

/* Goes on with the offers. Returns true if there is more to do at once. */
static bool rram_offers_step(struct rram_session *s)
{
	struct rram_dest *dst = s->dst;
	struct rram_offer *o, *next;

	list_for_each_entry_safe(o, next, &dst->offers, list) {
		while (o->next < o->nr) {
			unsigned int first = le16_to_cpu(o->run[o->next].first);
			unsigned int nr = le16_to_cpu(o->run[o->next].nr);
			int n;

			if (nr & RRAM_RUN_ZERO) {
				rram_take_zero(s, o->first + first,
					       nr & ~RRAM_RUN_ZERO);
				o->next++;
				continue;
			}
			n = rram_pull(s, o->first + first + o->at,
				      min(nr - o->at, s->batch),
				      RRAM_CAUSE_AHEAD, o);
			if (n == -ENOSPC && rram_short(s))
				rram_fail(s, RRAM_REASON_NO_MEMORY);
			if (n < 0)
				return false;	/* a completion will wake us */
			dst->short_since = 0;
			o->at += n;
			if (o->at == nr) {
				o->at = 0;
				o->next++;
			}
		}
		list_del(&o->list);
		rram_offer_put(s, o);
	}
	return false;
}

/* Tells the source which offers are through. */
static void rram_confirm(struct rram_session *s)
{
	struct rram_dest *dst = s->dst;
	struct rram_msg_pulled *m;
	struct rram_offer *o;
	struct rram_buf *b;

	for (;;) {
		spin_lock_irq(&dst->fetch_lock);
		o = list_first_entry_or_null(&dst->done, struct rram_offer, list);
		if (o && (o->failed || dst->freezing || rram_can_send(s)))
			list_del(&o->list);
		else
			o = NULL;
		spin_unlock_irq(&dst->fetch_lock);
		if (!o)
			return;
		if (!o->failed && !dst->freezing) {
			b = rram_msg_new(s, RRAM_MSG_PULLED);
			m = b->data;
			m->seq = cpu_to_le32(o->seq);
			rram_msg_send(s, b, sizeof(*m));
		}
		kfree(o);
		dst->nr_offers--;
	}
}

/* Nothing else may need the connection that is gone, or the time before. */
static void rram_drop_offers(struct rram_session *s)
{
	struct rram_dest *dst = s->dst;
	struct rram_offer *o, *next;

	list_for_each_entry_safe(o, next, &dst->offers, list) {
		list_del(&o->list);
		WRITE_ONCE(o->failed, true);
		rram_offer_put(s, o);
	}
}

static bool rram_set_key(struct rram_session *s, const struct rram_wire_key *k)
{
	struct rram_dest *dst = s->dst;
	u32 chunk = le32_to_cpu(k->chunk);

	if (chunk >= dst->nr_chunks)
		return false;
	spin_lock(&dst->key_lock);
	dst->key[chunk].iova = le64_to_cpu(k->iova);
	dst->key[chunk].rkey = le32_to_cpu(k->rkey);
	dst->key[chunk].valid = true;
	spin_unlock(&dst->key_lock);
	if (test_and_clear_bit(chunk, dst->want))
		rram_wake_chunk(s->f, chunk);
	clear_bit(chunk, dst->asked);
	atomic64_inc(&s->count.keys);
	return true;
}

static bool rram_offered(struct rram_session *s, struct rram_buf *b)
{
	struct rram_msg_offer *m = b->data;
	struct rram_dest *dst = s->dst;
	unsigned long first, pages;
	unsigned int i, nr;
	struct rram_offer *o;
	bool data = false;

	if (b->bytes < sizeof(*m) || dst->freezing)
		return false;
	nr = le32_to_cpu(m->nr);
	if (!nr || nr > RRAM_CHUNK_PAGES || b->bytes != struct_size(m, run, nr))
		return false;
	if (le32_to_cpu(m->key.chunk) >= dst->nr_chunks)
		return false;
	first = (unsigned long)le32_to_cpu(m->key.chunk) << RRAM_CHUNK_SHIFT;
	pages = min(s->f->npages - first, RRAM_CHUNK_PAGES);
	for (i = 0; i < nr; i++) {
		unsigned int n = le16_to_cpu(m->run[i].nr);

		data |= !(n & RRAM_RUN_ZERO);
		n &= ~RRAM_RUN_ZERO;
		if (!n || le16_to_cpu(m->run[i].first) + n > pages)
			return false;
	}
	if (data && !rram_set_key(s, &m->key))
		return false;
	/* No source that waits for its answers has more under way. */
	if (dst->nr_offers >= RRAM_WINDOW)
		return false;
	o = kmalloc(struct_size(o, run, nr), GFP_KERNEL);
	if (!o)
		return false;
	o->seq = le32_to_cpu(m->seq);
	o->first = first;
	o->nr = nr;
	o->next = 0;
	o->at = 0;
	o->failed = false;
	atomic_set(&o->pending, 1);
	memcpy(o->run, m->run, nr * sizeof(*o->run));
	list_add_tail(&o->list, &dst->offers);
	dst->nr_offers++;
	return true;
}

/* -- The switch ----------------------------------------------------------- */

/* Waits until no READ is under way. */
static void rram_quiesce(struct rram_session *s)
{
	while (!wait_event_timeout(s->wake, !atomic_read(&s->dst->active),
				   RRAM_TICK))
		rram_patience(s);
	atomic_set(&s->poke, 1);
}

/*
 * The final set begins to arrive. Offers that are not through count as not
 * taken, on both sides. What is on its way may be older than the final set:
 * it has to land before pages are marked.
 */
static void rram_dest_freeze(struct rram_session *s)
{
	struct rram_dest *dst = s->dst;
	struct rram_file *f = s->f;

	dst->switch_begun = ktime_get();
	rram_drop_offers(s);
	WRITE_ONCE(dst->freezing, true);
	/*
	 * A fault may hold the semaphore and wait for a folio that is being
	 * READ. So those READs have to end first.
	 */
	rram_quiesce(s);
	/* Who has not seen that nothing more may be READ holds it too. */
	while (!down_write_trylock(&f->stale)) {
		rram_patience(s);
		schedule_timeout_idle(1);
	}
	up_write(&f->stale);
	rram_quiesce(s);
	rram_confirm(s);
}

/*
 * A page is not here, whatever was here before. The caller holds f->stale for
 * writing, so nobody maps it at the same time; a fault that has found it here
 * holds the folio's lock until it is mapped.
 */
static void rram_make_missing(struct rram_session *s, unsigned long index)
{
	struct rram_file *f = s->f;
	struct folio *folio;

	if (test_and_set_bit(index, f->missing))
		return;
	atomic_long_inc(&f->nr_missing);
	atomic64_inc(&s->count.pages_stale);
	folio = rram_find_folio(f->shmem->f_mapping, index);
	if (!folio)
		return;		/* a hole, or swapped out: READ over it */
	folio_lock(folio);
	if (folio->mapping == f->shmem->f_mapping) {
		unmap_mapping_pages(f->shmem->f_mapping, index, 1, false);
		/* Nobody may map it as it is; see next_uptodate_folio(). */
		folio_clear_uptodate(folio);
	}
	folio_unlock(folio);
	folio_put(folio);
}

static void rram_list_run(struct rram_session *s, unsigned long first,
			  unsigned long nr, u8 heat)
{
	struct rram_file *f = s->f;
	unsigned long i = first, end = first + nr;

	memset(f->heat + first, heat, nr);
	s->dst->listed += nr;
	/* Most of a file that was not copied ahead is missing already. */
	while ((i = find_next_zero_bit(f->missing, end, i)) < end) {
		rram_make_missing(s, i++);
		cond_resched();
	}
}

/*
 * The source can't read this page: who touches it is told so, as of bad memory.
 * Its bit in f->inflight stays taken, so nobody READs what the source put in its
 * place, until the page is punched out.
 */
static void rram_lose(struct rram_session *s, unsigned long index)
{
	struct rram_file *f = s->f;

	if (!test_bit(index, f->missing) || test_bit(index, f->lost))
		return;
	rram_take(s, index);
	/* It may have come, or have been punched out, while this waited. */
	if (!test_bit(index, f->missing)) {
		rram_untake(f, index);
		return;
	}
	/* Counted before it can be punched out. */
	atomic_long_inc(&f->nr_lost);
	atomic64_inc(&s->count.pages_lost);
	set_bit(index, f->lost);
	rram_wake_page(f, index);
}

/* Some pages that are alike; they lie within the file. */
static void rram_list_pages(struct rram_session *s, unsigned long first,
			    unsigned int nr, u8 heat, u8 flags)
{
	unsigned long i;

	if (flags & RRAM_DIRTY_LOST) {
		for (i = first; i < first + nr; i++)
			rram_lose(s, i);
		return;
	}
	if (!(flags & RRAM_DIRTY_ZERO)) {
		rram_list_run(s, first, nr, heat);
		return;
	}
	if (!rram_switched(s->state)) {
		rram_take_zero(s, first, nr);
		return;
	}
	/* After the switch: not what the guest has got otherwise. */
	for (i = first; i < first + nr; i++)
		if (test_bit(i, s->f->missing) && !test_bit(i, s->f->lost))
			rram_take_zero(s, i, 1);
}

static bool rram_list_entry(struct rram_session *s,
			    const struct rram_wire_dirty *d, const __le64 *bits)
{
	unsigned long first = le32_to_cpu(d->first);
	unsigned int nr = le16_to_cpu(d->nr), i;
	struct rram_file *f = s->f;
	struct rram_dest *dst = s->dst;

	if (d->flags & ~RRAM_DIRTY_FLAGS)
		return false;
	if (d->heat >= RRAM_HEAT_CLASSES || !nr || first >= f->npages ||
	    (!bits && nr > f->npages - first))
		return false;
	/* After the switch nothing becomes missing any more; before it, lost. */
	if (rram_switched(s->state) ?
	    !(d->flags & (RRAM_DIRTY_ZERO | RRAM_DIRTY_LOST)) :
	    d->flags & RRAM_DIRTY_LOST)
		return false;
	if (d->flags & RRAM_DIRTY_REKEY) {
		unsigned long last = (first + nr - 1) >> RRAM_CHUNK_SHIFT;
		unsigned long c;

		spin_lock(&dst->key_lock);
		for (c = first >> RRAM_CHUNK_SHIFT;
		     c <= last && c < dst->nr_chunks; c++)
			dst->key[c].valid = false;
		spin_unlock(&dst->key_lock);
	}
	if (!bits) {
		rram_list_pages(s, first, nr, d->heat, d->flags);
		return true;
	}
	for (i = 0; i < nr; i++) {
		if (!(get_unaligned_le64(bits + i / 64) >> (i % 64) & 1))
			continue;
		if (first + i >= f->npages)
			return false;
		rram_list_pages(s, first + i, 1, d->heat, d->flags);
	}
	return true;
}

static bool rram_listed(struct rram_session *s, struct rram_buf *b)
{
	struct rram_msg_dirty *m = b->data;
	struct rram_dest *dst = s->dst;
	struct rram_file *f = s->f;
	bool ahead = !rram_switched(s->state), fine = true;
	void *at = m->entry, *end = b->data + b->bytes;
	unsigned int i, nr;

	if (b->bytes < sizeof(*m))
		return false;
	if (ahead && !dst->freezing)
		rram_dest_freeze(s);
	nr = le32_to_cpu(m->nr);
	if (ahead)
		down_write(&f->stale);
	for (i = 0; i < nr && fine; i++) {
		struct rram_wire_dirty *d = at;
		__le64 *bits = NULL;

		fine = end - at >= sizeof(*d);
		if (!fine)
			break;
		at = d + 1;
		if (d->flags & RRAM_DIRTY_BITS) {
			unsigned int n = le16_to_cpu(d->nr);

			fine = n % 64 == 0 && end - at >= n / 8;
			if (!fine)
				break;
			bits = at;
			at += n / 8;
		}
		fine = rram_list_entry(s, d, bits);
		/* An entry may name all of the file, and do nothing. */
		cond_resched();
	}
	if (ahead)
		up_write(&f->stale);
	return fine && at == end;
}

/* Says that the final set is in; later if there is no room for it now. */
static void rram_answer_switch(struct rram_session *s)
{
	struct rram_dest *dst = s->dst;
	struct rram_msg_switch *m;
	struct rram_buf *b;

	if (dst->answered || !rram_can_send(s))
		return;
	b = rram_msg_new(s, RRAM_MSG_SWITCHED);
	m = b->data;
	m->pages = cpu_to_le64(dst->listed);
	rram_msg_send(s, b, sizeof(*m));
	dst->answered = true;
}

/* The final set is complete: from here on the VM may run. */
static bool rram_switch_now(struct rram_session *s, struct rram_buf *b)
{
	struct rram_msg_switch *m = b->data;
	struct rram_dest *dst = s->dst;
	struct rram_file *f = s->f;
	unsigned long i;

	if (b->bytes != sizeof(*m) || rram_switched(s->state))
		return false;
	if (!dst->freezing)
		rram_dest_freeze(s);
	if (le64_to_cpu(m->pages) != dst->listed)
		return false;
	down_write(&f->stale);
	/* What was written here meanwhile is not the VM's. */
	WRITE_ONCE(f->tracking, false);
	for_each_set_bit(i, f->dirty, f->npages) {
		rram_make_missing(s, i);
		/* What its key leads to may be older than that it is zero. */
		spin_lock(&dst->key_lock);
		dst->key[i >> RRAM_CHUNK_SHIFT].valid = false;
		spin_unlock(&dst->key_lock);
		cond_resched();
	}
	bitmap_zero(f->dirty, f->npages);
	spin_lock(&dst->order_lock);
	rram_order_init(&dst->order, f->npages);
	spin_unlock(&dst->order_lock);
	/* From here on bits are only cleared, and need no semaphore. */
	WRITE_ONCE(f->phase, RRAM_PHASE_AFTER);
	up_write(&f->stale);
	dst->switch_us = ktime_us_delta(ktime_get(), dst->switch_begun);
	rram_set_state(s, RRAM_STATE_POSTCOPY, RRAM_REASON_NONE);
	dst->answered = false;
	rram_answer_switch(s);
	rram_wake_pages(f);
	return true;
}

/* Deals with a message. Returns false if the session can't go on. */
bool rram_dest_message(struct rram_session *s, struct rram_buf *b)
{
	struct rram_dest *dst = s->dst;
	struct rram_msg *msg = b->data;
	bool over = rram_ended(s->state);
	unsigned int i, n;

	switch (msg->type) {
	case RRAM_MSG_OFFER:
		return !rram_switched(s->state) && !over && rram_offered(s, b);
	case RRAM_MSG_DIRTY:
		/* What is zero is no longer news when all is in. */
		return over || rram_listed(s, b);
	case RRAM_MSG_SWITCH:
		return !over && rram_switch_now(s, b);
	case RRAM_MSG_KEY: {
		struct rram_msg_key *m = b->data;

		if (b->bytes < sizeof(*m))
			return false;
		n = le32_to_cpu(m->nr);
		if (n > RRAM_MSG_SIZE / sizeof(m->key[0]) ||
		    b->bytes != struct_size(m, key, n))
			return false;
		for (i = 0; i < n; i++)
			if (!rram_set_key(s, &m->key[i]))
				return false;
		return true;
	}
	case RRAM_MSG_BYE:
		dst->bye = true;
		return over;
	default:
		return false;
	}
}

/* -- After the switch ----------------------------------------------------- */

static void rram_ask_for_keys(struct rram_session *s)
{
	struct rram_dest *dst = s->dst;
	struct rram_msg_want *m;
	unsigned int n = 0;
	unsigned long i;
	struct rram_buf *b;

	for_each_set_bit(i, dst->want, dst->nr_chunks)
		if (!test_bit(i, dst->asked))
			n++;
	if (!n || !rram_can_send(s))
		return;
	b = rram_msg_new(s, RRAM_MSG_WANT);
	m = b->data;
	n = 0;
	for_each_set_bit(i, dst->want, dst->nr_chunks) {
		if (test_bit(i, dst->asked) || n >= 256)
			continue;
		set_bit(i, dst->asked);
		m->chunk[n++] = cpu_to_le32(i);
	}
	m->nr = cpu_to_le32(n);
	rram_msg_send(s, b, struct_size(m, chunk, n));
}

/*
 * Whether a chunk's key has been waited for so long that others go first: the
 * source may have no room for it.
 */
static bool rram_stuck(struct rram_session *s, unsigned long chunk)
{
	struct rram_dest *dst = s->dst;

	if (dst->stuck != chunk || !dst->stuck_since) {
		dst->stuck = chunk;
		dst->stuck_since = jiffies ?: 1;
	}
	return time_after(jiffies, dst->stuck_since + HZ);
}

/*
 * READs the next pages that nobody waits for, @most at most. Returns how many,
 * or an error when there is nothing to do for now.
 */
static int rram_pull_next(struct rram_session *s, unsigned int most)
{
	struct rram_dest *dst = s->dst;
	struct rram_file *f = s->f;
	struct rram_run run;
	bool bubble;
	int n;

	spin_lock(&dst->order_lock);
	run = rram_order_next(&dst->order, f->missing, f->inflight, f->heat,
			      most, &bubble);
	spin_unlock(&dst->order_lock);
	if (rram_order_idle(&dst->order, run)) {
		/*
		 * Passed by, and not arrived: taken by somebody who gave it up,
		 * or lost with a connection.
		 */
		if (!atomic_read(&dst->active)) {
			spin_lock(&dst->order_lock);
			rram_order_failed(&dst->order, 0);
			spin_unlock(&dst->order_lock);
		}
		return -EAGAIN;
	}
	if (!run.nr)
		return 0;
	n = rram_pull(s, run.first, run.nr, bubble ?
		      RRAM_CAUSE_BUBBLE : RRAM_CAUSE_BACKGROUND, NULL);
	/* It is found again when all the rest was looked at. */
	if (n == -EAGAIN && rram_stuck(s, run.first >> RRAM_CHUNK_SHIFT))
		return 0;
	if (n < 0) {
		spin_lock(&dst->order_lock);
		rram_order_failed(&dst->order, run.first);
		spin_unlock(&dst->order_lock);
	}
	return n;
}

/* Pulls what nobody waits for. */
static void rram_pull_step(struct rram_session *s)
{
	struct rram_dest *dst = s->dst;

	if (!READ_ONCE(s->background))
		return;
	for (;;) {
		unsigned int most = READ_ONCE(s->batch);
		int n;

		/*
		 * Whoever waits goes first: while there are demand READs, small
		 * pieces around them, and only one at a time.
		 */
		if (atomic_read(&dst->demand)) {
			if (atomic_read(&dst->active) >
			    atomic_read(&dst->demand))
				return;
			most = min(most, 8U);
		}
		if (list_empty_careful(&dst->bulk))
			return;
		if (rram_throttled(s, (u64)most << PAGE_SHIFT))
			return;
		n = rram_pull_next(s, most);
		/* What is not READ takes no bandwidth. */
		rram_unthrottle(s, (u64)(most - max(n, 0)) << PAGE_SHIFT);
		if (n < 0)
			return;
	}
}

static void rram_dest_measure(struct rram_dest *dst)
{
	ktime_t now = ktime_get();
	s64 us = ktime_us_delta(now, dst->rate_at);

	if (us < 100 * USEC_PER_MSEC)
		return;
	dst->rate = (dst->rate + 3 * div64_u64(atomic64_xchg(&dst->rate_bytes, 0) *
					       USEC_PER_SEC, us)) / 4;
	dst->rate_at = now;
}

/* Tells the source, whose operator watches, how things stand. */
static bool rram_tell(struct rram_session *s)
{
	struct rram_msg_progress *m;
	struct rram_counters *c = &s->count;
	struct rram_buf *b;
	unsigned int i;

	if (!rram_can_send(s))
		return false;
	b = rram_msg_new(s, RRAM_MSG_PROGRESS);
	m = b->data;
	m->missing = cpu_to_le64(rram_lacking(s->f));
	m->demand = cpu_to_le64(atomic64_read(&c->pages_demand));
	m->bubble = cpu_to_le64(atomic64_read(&c->pages_bubble));
	m->background = cpu_to_le64(atomic64_read(&c->pages_background));
	m->bytes_after = cpu_to_le64(atomic64_read(&c->bytes_after));
	m->nowait = cpu_to_le64(atomic64_read(&c->faults_nowait));
	m->retry = cpu_to_le64(atomic64_read(&c->faults_retry));
	m->plain = cpu_to_le64(atomic64_read(&c->faults_plain));
	m->joined = cpu_to_le64(atomic64_read(&c->faults_joined));
	m->wait_ns_total = cpu_to_le64(atomic64_read(&c->wait_ns_total));
	m->wait_ns_max = cpu_to_le64(atomic64_read(&c->wait_ns_max));
	m->read_ns_total = cpu_to_le64(atomic64_read(&c->read_ns_total));
	m->rate = cpu_to_le64(s->dst->rate);
	for (i = 0; i < RRAM_HIST_BUCKETS; i++) {
		m->wait_hist[i] = cpu_to_le64(atomic64_read(&c->wait_hist[i]));
		m->read_hist[i] = cpu_to_le64(atomic64_read(&c->read_hist[i]));
	}
	rram_msg_send(s, b, sizeof(*m));
	s->dst->told_at = jiffies;
	return true;
}

/* All is in: the destination needs nobody any more. */
static void rram_dest_complete(struct rram_session *s)
{
	struct rram_file *f = s->f;

	/* What is missing now is lost, or about to be punched out. */
	WRITE_ONCE(f->phase, atomic_long_read(&f->nr_missing) ?
			     RRAM_PHASE_LOST : RRAM_PHASE_PLAIN);
	s->dst->ended_at = jiffies;
	rram_set_state(s, RRAM_STATE_COMPLETE, RRAM_REASON_NONE);
	rram_tell(s);
	s->dst->said = rram_say(s, RRAM_MSG_COMPLETE);
	rram_wake_pages(f);
}

/* One turn of the destination's work. Returns true if there is more at once. */
bool rram_dest_step(struct rram_session *s)
{
	enum rram_state state = rram_get_state(s, NULL);
	struct rram_file *f = s->f;
	bool more = false;

	rram_dest_measure(s->dst);
	rram_confirm(s);
	rram_ask_for_keys(s);
	/* There may have been no room for it when all was in. */
	if (state == RRAM_STATE_COMPLETE && !s->dst->said)
		s->dst->said = rram_say(s, RRAM_MSG_COMPLETE);
	if (state == RRAM_STATE_CONNECTED && !s->dst->freezing)
		more = rram_offers_step(s);
	if (state == RRAM_STATE_POSTCOPY) {
		rram_answer_switch(s);
		if (time_after(jiffies, s->dst->told_at +
			       msecs_to_jiffies(s->args.heartbeat_ms)))
			rram_tell(s);
		if (rram_lacking(f))
			rram_pull_step(s);
		/* A page that is not missing may still have to be unlocked. */
		if (!rram_lacking(f) &&
		    !atomic_read(&s->dst->active) && s->dst->answered)
			rram_dest_complete(s);
	}
	return more;
}

/*
 * Whether there is still somebody to be told of the end. A source that is cut
 * off at that moment comes back as late as after any other cut.
 */
bool rram_dest_lingers(struct rram_session *s)
{
	return !s->dst->bye && !READ_ONCE(s->aborted) &&
	       (s->args.reconnect_ms == ~0U ||
		time_before(jiffies, s->dst->ended_at +
				     msecs_to_jiffies(s->args.reconnect_ms)));
}

/*
 * Whether a READ has been under way for longer than a connection may be silent:
 * then it is the connection that READs take which is gone. Looks once a second.
 */
bool rram_dest_stuck(struct rram_session *s)
{
	u64 ms = max_t(u64, 2 * (u64)s->args.dead_ms, 10 * MSEC_PER_SEC);
	struct rram_dest *dst = s->dst;
	unsigned int i;
	ktime_t now;

	if (!atomic_read(&dst->active) ||
	    time_before(jiffies, dst->looked_at + HZ))
		return false;
	dst->looked_at = jiffies;
	now = ktime_get();
	for (i = 0; i < RRAM_URGENT_DEPTH + RRAM_BULK_DEPTH; i++) {
		struct rram_fetch *r = &dst->fetches[i];

		if (READ_ONCE(r->under_way) &&
		    ktime_to_ms(ktime_sub(now, READ_ONCE(r->posted))) > (s64)ms)
			return true;
	}
	return false;
}

void rram_dest_linked(struct rram_session *s)
{
	if (rram_get_state(s, NULL) != RRAM_STATE_COMPLETE)
		return;
	rram_tell(s);
	s->dst->said = rram_say(s, RRAM_MSG_COMPLETE);
}

/*
 * A queue pair has been drained: what has not ended will not. siw forgets the
 * READs that wait for an answer when it closes a connection whose send queue
 * is empty.
 */
void rram_dest_sweep(struct rram_session *s, enum rram_link_kind kind,
		     struct ib_qp *qp)
{
	struct ib_wc wc = { .status = IB_WC_WR_FLUSH_ERR, .qp = qp };
	bool bulk = kind == RRAM_LINK_BULK;
	unsigned int i;

	for (i = 0; i < RRAM_URGENT_DEPTH + RRAM_BULK_DEPTH; i++) {
		struct rram_fetch *r = &s->dst->fetches[i];

		if (r->bulk != bulk || !READ_ONCE(r->under_way))
			continue;
		wc.wr_cqe = &r->cqe;
		rram_fetch_done(NULL, &wc);
	}
}

/* The connection is down, and with it all keys and all that was under way. */
void rram_dest_drop(struct rram_session *s)
{
	struct rram_dest *dst = s->dst;

	spin_lock(&dst->key_lock);
	memset(dst->key, 0, dst->nr_chunks * sizeof(*dst->key));
	spin_unlock(&dst->key_lock);
	bitmap_zero(dst->want, dst->nr_chunks);
	bitmap_zero(dst->asked, dst->nr_chunks);
	/* A source that has not been told by now has failed, and stays so. */
	dst->answered = true;
	rram_drop_offers(s);
	rram_confirm(s);
}

/* Ended before all was in. */
void rram_dest_end(struct rram_session *s, bool lost)
{
	struct rram_file *f = s->f;

	if (lost)
		atomic64_set(&s->count.pages_lost,
			     atomic_long_read(&f->nr_missing));
	down_write(&f->stale);
	WRITE_ONCE(f->tracking, false);
	WRITE_ONCE(f->phase, lost ? RRAM_PHASE_LOST : RRAM_PHASE_FAILED);
	up_write(&f->stale);
	rram_wake_pages(f);
}

int rram_dest_new(struct rram_session *s)
{
	unsigned long n = DIV_ROUND_UP(s->f->npages, RRAM_CHUNK_PAGES);
	struct rram_dest *dst = kzalloc(sizeof(*dst), GFP_KERNEL);
	unsigned int i, all = RRAM_URGENT_DEPTH + RRAM_BULK_DEPTH;
	struct rram_fetch *r;

	if (!dst)
		return -ENOMEM;
	s->dst = dst;
	s->state = RRAM_STATE_LISTENING;
	dst->nr_chunks = n;
	dst->answered = true;	/* nothing to answer yet */
	spin_lock_init(&dst->key_lock);
	spin_lock_init(&dst->fetch_lock);
	spin_lock_init(&dst->order_lock);
	INIT_LIST_HEAD(&dst->offers);
	INIT_LIST_HEAD(&dst->done);
	INIT_LIST_HEAD(&dst->urgent);
	INIT_LIST_HEAD(&dst->queue);
	INIT_LIST_HEAD(&dst->bulk);
	dst->rate_at = ktime_get();
	dst->looked_at = jiffies;
	dst->memcg = rram_memcg_of_current();
	dst->key = kvcalloc(n, sizeof(*dst->key), GFP_KERNEL);
	dst->want = kvcalloc(BITS_TO_LONGS(n), sizeof(long), GFP_KERNEL);
	dst->asked = kvcalloc(BITS_TO_LONGS(n), sizeof(long), GFP_KERNEL);
	dst->fetches = kvcalloc(all, sizeof(*r), GFP_KERNEL);
	if (!dst->key || !dst->want || !dst->asked || !dst->fetches)
		return -ENOMEM;
	for (i = 0; i < all; i++) {
		bool bulk = i >= RRAM_URGENT_DEPTH;
		unsigned int pages = bulk ? RRAM_BATCH_MAX : 1;

		r = &dst->fetches[i];
		r->s = s;
		r->bulk = bulk;
		r->folio = kcalloc(pages, sizeof(*r->folio), GFP_KERNEL);
		r->sg = kcalloc(pages, sizeof(*r->sg), GFP_KERNEL);
		if (!r->folio || !r->sg)
			return -ENOMEM;
		list_add_tail(&r->list, bulk ? &dst->bulk : &dst->urgent);
	}
	return 0;
}

void rram_dest_free(struct rram_session *s)
{
	struct rram_dest *dst = s->dst;
	struct rram_offer *o, *next;
	unsigned int i;

	if (!dst)
		return;
	list_for_each_entry_safe(o, next, &dst->done, list)
		kfree(o);
	for (i = 0; dst->fetches && i < RRAM_URGENT_DEPTH + RRAM_BULK_DEPTH; i++) {
		kfree(dst->fetches[i].folio);
		kfree(dst->fetches[i].sg);
	}
	kvfree(dst->fetches);
	kvfree(dst->key);
	kvfree(dst->want);
	kvfree(dst->asked);
	rram_memcg_put(dst->memcg);
	kfree(dst);
}

void rram_dest_stats(struct rram_session *s, struct rram_stats *st)
{
	struct rram_dest *dst = s->dst;

	st->rate = dst->rate;
	st->switch_us = dst->switch_us;
	st->remaining_us = dst->rate ?
		div64_u64((st->pages_missing << PAGE_SHIFT) * USEC_PER_SEC,
			  dst->rate) : ~0ULL;
	st->memory = dst->nr_chunks * sizeof(*dst->key) +
		(RRAM_URGENT_DEPTH + RRAM_BULK_DEPTH) *
		sizeof(struct rram_fetch) + RRAM_BULK_DEPTH * RRAM_BATCH_MAX *
		(sizeof(struct folio *) + sizeof(struct scatterlist));
}

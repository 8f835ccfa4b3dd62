// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * The two connections of a session, and the messages on one of them.
 *
 * Identifiers, queue pairs and their buffers are made and destroyed by the
 * session's thread alone; the connection manager's handler only notes what
 * happened and wakes it.
 */
#include <linux/inet.h>
#include <linux/random.h>
#include <linux/sched/signal.h>
#include <linux/siphash.h>
#include <rdma/ib_cm.h>

#include "remote_ram.h"
#include "trace.h"

#define RRAM_STEP_MS	2000	/* for each step of connecting */
#define RRAM_BACKLOG	8
#define RRAM_PAUSE_MS	100	/* between two attempts to connect, at first */
#define RRAM_PAUSE_MOST	2000	/* and at last */

static bool rram_needs_sink_key(struct ib_device *dev)
{
	/*
	 * iWARP writes READ data by key. The software device takes the local
	 * one; hardware does not.
	 */
	return READ_ONCE(rram_sink_keys) ||
	       (rdma_protocol_iwarp(dev, 1) &&
		dev->ops.driver_id != RDMA_DRIVER_SIW);
}

/* Notes how a link fared; the thread looks when it is woken. */
static void rram_link_note(struct rram_link *l, int stage, bool failed,
			   int reason)
{
	if (failed) {
		l->reason = reason;
		/* The reason is there before the failure is seen. */
		smp_store_release(&l->failed, true);
	} else {
		WRITE_ONCE(l->stage, stage);
	}
	rram_poke(l->s);
}

/*
 * What only somebody can say of a request who knows the session's secret:
 * SipHash-2-4 with the secret as its key. Who listens in the destination's
 * place, or connects in the source's, does not learn the secret by that, and
 * an answer fits one request alone.
 */
static __le64 rram_proof(struct rram_session *s, const struct rram_hello *h,
			 enum rram_role who)
{
	struct {
		struct rram_hello hello;
		u8 who;
	} __packed said = { .hello = *h, .who = who };
	siphash_key_t key;
	__le64 word[2];
	u64 proof;

	BUILD_BUG_ON(sizeof(word) != RRAM_TOKEN_LEN);
	memcpy(word, s->args.token, sizeof(word));
	key.key[0] = le64_to_cpu(word[0]);
	key.key[1] = le64_to_cpu(word[1]);
	said.hello.proof = 0;
	proof = siphash(&said, sizeof(said), &key);
	memzero_explicit(&key, sizeof(key));
	memzero_explicit(word, sizeof(word));
	return cpu_to_le64(proof);
}

/* Whether who has accepted is the destination; the reason if not. */
static int rram_judge_answer(struct rram_link *l, struct rdma_cm_event *ev)
{
	const struct rram_answer *answer = ev->param.conn.private_data;

	if (!answer || ev->param.conn.private_data_len < sizeof(*answer) ||
	    le32_to_cpu(answer->magic) != RRAM_MAGIC || answer->reason)
		return RRAM_REASON_PROTOCOL;
	if (le16_to_cpu(answer->version) != RRAM_WIRE_VERSION)
		return RRAM_REASON_VERSION;
	/* Says nothing by the time it takes. */
	if (crypto_memneq(&answer->proof, &l->proof, sizeof(l->proof)))
		return RRAM_REASON_TOKEN;
	return RRAM_REASON_NONE;
}

static int rram_reject_reason(struct rdma_cm_event *ev)
{
	/*
	 * Not rdma_consumer_reject_data(): siw reports a refusal as a reset,
	 * which that does not take for one. The magic number tells.
	 */
	const struct rram_answer *answer = ev->param.conn.private_data;
	int reason;

	if (!answer || ev->param.conn.private_data_len <
		       offsetofend(struct rram_answer, reason) ||
	    le32_to_cpu(answer->magic) != RRAM_MAGIC)
		return RRAM_REASON_UNREACHABLE;
	reason = le16_to_cpu(answer->reason);
	/* One that this side does not know can't be shown. */
	return reason > RRAM_REASON_NONE && reason <= RRAM_REASON_DEVICE ?
	       reason : RRAM_REASON_PROTOCOL;
}

/* For the two links, on both sides. */
static int rram_link_event(struct rdma_cm_id *id, struct rdma_cm_event *ev)
{
	struct rram_link *l = id->context;
	int reason;

	trace_rram_cm(l->s->f, ev->event, ev->status);
	switch (ev->event) {
	case RDMA_CM_EVENT_ADDR_RESOLVED:
	case RDMA_CM_EVENT_ROUTE_RESOLVED:
		rram_link_note(l, ev->event, false, 0);
		break;
	case RDMA_CM_EVENT_ESTABLISHED:
		reason = l->s->role == RRAM_ROLE_SOURCE ?
			 rram_judge_answer(l, ev) : RRAM_REASON_NONE;
		if (reason) {
			rram_link_note(l, 0, true, reason);
			break;
		}
		l->up = true;
		rram_link_note(l, ev->event, false, 0);
		break;
	case RDMA_CM_EVENT_REJECTED:
		rram_link_note(l, 0, true, rram_reject_reason(ev));
		break;
	case RDMA_CM_EVENT_ADDR_ERROR:
	case RDMA_CM_EVENT_ROUTE_ERROR:
	case RDMA_CM_EVENT_CONNECT_ERROR:
	case RDMA_CM_EVENT_UNREACHABLE:
		rram_link_note(l, 0, true, RRAM_REASON_UNREACHABLE);
		break;
	case RDMA_CM_EVENT_DISCONNECTED:
	case RDMA_CM_EVENT_ADDR_CHANGE:
		rram_link_note(l, 0, true, RRAM_REASON_DISCONNECTED);
		break;
	case RDMA_CM_EVENT_DEVICE_REMOVAL:
		/* The thread takes everything down that is on the device. */
		rram_link_note(l, 0, true, RRAM_REASON_DEVICE);
		break;
	default:
		break;
	}
	return 0;
}

/* A request that nobody has looked at may vanish again. */
static int rram_request_event(struct rdma_cm_id *id, struct rdma_cm_event *ev)
{
	struct rram_request *r = id->context;

	WRITE_ONCE(r->gone, true);
	return 0;
}

/* For the identifier that listens. */
static int rram_listener_event(struct rdma_cm_id *id, struct rdma_cm_event *ev)
{
	struct rram_session *s;
	struct rram_request *r;
	unsigned int n = 0;
	struct list_head *pos;

	/*
	 * For a request, id is the new identifier; it has inherited the
	 * listener's context.
	 */
	s = id->context;
	if (ev->event == RDMA_CM_EVENT_DEVICE_REMOVAL) {
		WRITE_ONCE(s->deaf, true);
		rram_poke(s);
	}
	if (ev->event != RDMA_CM_EVENT_CONNECT_REQUEST)
		return 0;
	if (ev->param.conn.private_data_len < sizeof(r->hello))
		return -EINVAL;		/* destroys the new identifier */
	r = kzalloc(sizeof(*r), GFP_KERNEL);
	if (!r)
		return -ENOMEM;
	r->id = id;
	r->depth = ev->param.conn.initiator_depth;
	memcpy(&r->hello, ev->param.conn.private_data, sizeof(r->hello));
	spin_lock(&s->state_lock);
	list_for_each(pos, &s->requests)
		n++;
	if (n < RRAM_BACKLOG) {
		id->context = r;
		id->event_handler = rram_request_event;
		list_add_tail(&r->list, &s->requests);
	}
	spin_unlock(&s->state_lock);
	if (n >= RRAM_BACKLOG) {
		kfree(r);
		return -EBUSY;
	}
	rram_poke(s);
	return 0;
}

int rram_listen(struct rram_session *s)
{
	struct sockaddr *addr = (struct sockaddr *)s->args.addr;
	struct rdma_cm_id *id;
	int err;

	id = rdma_create_id(s->net, rram_listener_event, s, RDMA_PS_TCP,
			    IB_QPT_RC);
	if (IS_ERR(id))
		return PTR_ERR(id);
	rdma_set_reuseaddr(id, 1);
	err = rdma_bind_addr(id, addr);
	if (err)
		goto destroy;
	err = rdma_listen(id, RRAM_BACKLOG);
	if (err)
		goto destroy;
	/* With port 0, now it is known which. */
	memcpy(addr, &id->route.addr.src_addr, sizeof(struct sockaddr_storage));
	s->listener = id;
	return 0;
destroy:
	rdma_destroy_id(id);
	return err;
}

void rram_unlisten(struct rram_session *s)
{
	struct rram_request *r, *next;

	if (!s->listener)
		return;
	/* No handler runs after this. */
	rdma_destroy_id(s->listener);
	s->listener = NULL;
	list_for_each_entry_safe(r, next, &s->requests, list) {
		list_del(&r->list);
		rdma_destroy_id(r->id);
		kfree(r);
	}
}

/* -- Messages ------------------------------------------------------------- */

static void rram_send_done(struct ib_cq *cq, struct ib_wc *wc)
{
	struct rram_buf *b = container_of(wc->wr_cqe, struct rram_buf, cqe);
	struct rram_session *s = b->s;
	unsigned long flags;

	if (wc->status != IB_WC_SUCCESS)
		WRITE_ONCE(s->broken, true);
	spin_lock_irqsave(&s->buf_lock, flags);
	list_add(&b->list, &s->tx);
	spin_unlock_irqrestore(&s->buf_lock, flags);
	rram_poke(s);
}

static void rram_recv_done(struct ib_cq *cq, struct ib_wc *wc)
{
	struct rram_buf *b = container_of(wc->wr_cqe, struct rram_buf, cqe);
	struct rram_session *s = b->s;
	unsigned long flags;

	if (wc->status != IB_WC_SUCCESS) {
		WRITE_ONCE(s->broken, true);
		rram_poke(s);
		return;
	}
	b->bytes = wc->byte_len;
	ib_dma_sync_single_for_cpu(s->dev, b->dma, RRAM_MSG_SIZE,
				   DMA_FROM_DEVICE);
	spin_lock_irqsave(&s->buf_lock, flags);
	list_add_tail(&b->list, &s->rx);
	spin_unlock_irqrestore(&s->buf_lock, flags);
	rram_poke(s);
}

static int rram_post_recv(struct rram_session *s, struct rram_buf *b)
{
	struct ib_sge sge = {
		.addr = b->dma,
		.length = RRAM_MSG_SIZE,
		.lkey = s->pd->local_dma_lkey,
	};
	struct ib_recv_wr wr = {
		.wr_cqe = &b->cqe,
		.sg_list = &sge,
		.num_sge = 1,
	};

	ib_dma_sync_single_for_device(s->dev, b->dma, RRAM_MSG_SIZE,
				      DMA_FROM_DEVICE);
	return ib_post_recv(s->link[RRAM_LINK_BULK].id->qp, &wr, NULL);
}

static void rram_free_bufs(struct rram_session *s)
{
	unsigned int i;

	if (!s->bufs)
		return;
	for (i = 0; i < 2 * RRAM_MSG_DEPTH + RRAM_MSG_SPARE; i++) {
		struct rram_buf *b = &s->bufs[i];

		if (!b->data)
			break;
		ib_dma_unmap_single(s->dev, b->dma, RRAM_MSG_SIZE,
				    DMA_BIDIRECTIONAL);
		kfree(b->data);
	}
	kvfree(s->bufs);
	s->bufs = NULL;
	INIT_LIST_HEAD(&s->tx);
	INIT_LIST_HEAD(&s->rx);
	INIT_LIST_HEAD(&s->unsent);
}

/* Makes the buffers of a connection and posts those for receiving. */
static int rram_make_bufs(struct rram_session *s)
{
	unsigned int i;
	int err;

	s->bufs = kvcalloc(2 * RRAM_MSG_DEPTH + RRAM_MSG_SPARE,
			   sizeof(*s->bufs), GFP_KERNEL);
	if (!s->bufs)
		return -ENOMEM;
	for (i = 0; i < 2 * RRAM_MSG_DEPTH + RRAM_MSG_SPARE; i++) {
		struct rram_buf *b = &s->bufs[i];
		bool sends = i < RRAM_MSG_DEPTH;

		b->s = s;
		b->data = kmalloc(RRAM_MSG_SIZE, GFP_KERNEL);
		if (!b->data)
			return -ENOMEM;
		b->dma = ib_dma_map_single(s->dev, b->data, RRAM_MSG_SIZE,
					   DMA_BIDIRECTIONAL);
		if (ib_dma_mapping_error(s->dev, b->dma)) {
			kfree(b->data);
			b->data = NULL;
			return -ENOMEM;
		}
		if (sends) {
			b->cqe.done = rram_send_done;
			list_add(&b->list, &s->tx);
		} else {
			b->cqe.done = rram_recv_done;
			err = rram_post_recv(s, b);
			if (err)
				return err;
		}
	}
	s->credits = RRAM_MSG_DEPTH;
	s->owed = 0;
	s->regs = 0;
	atomic_set(&s->regs_done, 0);
	return 0;
}

/* Whether a message may be sent now: buffer and credit are there. */
bool rram_can_send(struct rram_session *s)
{
	return s->credits > 0 && !list_empty_careful(&s->tx) &&
	       !READ_ONCE(s->broken);
}

struct rram_buf *rram_msg_new(struct rram_session *s, enum rram_msg_type type)
{
	struct rram_buf *b;
	struct rram_msg *msg;

	spin_lock_irq(&s->buf_lock);
	b = list_first_entry(&s->tx, struct rram_buf, list);
	list_del(&b->list);
	spin_unlock_irq(&s->buf_lock);
	msg = b->data;
	msg->magic = cpu_to_le32(RRAM_MAGIC);
	msg->type = type;
	return b;
}

static void rram_msg_post(struct rram_session *s, struct rram_buf *b)
{
	struct ib_sge sge = {
		.addr = b->dma,
		.length = b->bytes,
		.lkey = s->pd->local_dma_lkey,
	};
	struct ib_send_wr wr = {
		.wr_cqe = &b->cqe,
		.sg_list = &sge,
		.num_sge = 1,
		.opcode = IB_WR_SEND,
		.send_flags = IB_SEND_SIGNALED,
	};
	int err;

	ib_dma_sync_single_for_device(s->dev, b->dma, b->bytes, DMA_TO_DEVICE);
	err = ib_post_send(s->link[RRAM_LINK_BULK].id->qp, &wr, NULL);
	if (err) {
		spin_lock_irq(&s->buf_lock);
		list_add(&b->list, &s->tx);
		spin_unlock_irq(&s->buf_lock);
		WRITE_ONCE(s->broken, true);
	}
}

/*
 * Sends what may be sent: a message goes after the registrations that were
 * posted before it, since it may hold their keys. The queue pair can't see to
 * that, as it is another one: a registration that stands behind a message is
 * made once more by rxe when the message is sent once more, which fails and
 * ends the queue pair. The urgent one of a source sends nothing again.
 */
void rram_msg_push(struct rram_session *s)
{
	struct rram_buf *b;

	while (!list_empty(&s->unsent)) {
		b = list_first_entry(&s->unsent, struct rram_buf, list);
		/* In this order: one that failed says so before it counts. */
		if ((s32)((u32)atomic_read_acquire(&s->regs_done) - b->after) < 0 ||
		    READ_ONCE(s->broken))
			break;
		list_del(&b->list);
		rram_msg_post(s, b);
	}
}

void rram_msg_send(struct rram_session *s, struct rram_buf *b,
		   unsigned int bytes)
{
	struct rram_msg *msg = b->data;

	msg->bytes = cpu_to_le16(bytes);
	msg->credit = s->owed;
	s->owed = 0;
	if (msg->type != RRAM_MSG_CREDIT)
		s->credits--;
	s->last_tx = jiffies;
	b->bytes = bytes;
	b->after = s->regs;
	list_add_tail(&b->list, &s->unsent);
	rram_msg_push(s);
}

/* Waits a little until what was sent has left. */
void rram_msg_flush(struct rram_session *s)
{
	unsigned int i;

	for (i = 0; i < 10 && !READ_ONCE(s->broken); i++) {
		unsigned int n = 0;
		struct list_head *pos;

		rram_msg_push(s);
		spin_lock_irq(&s->buf_lock);
		list_for_each(pos, &s->tx)
			n++;
		spin_unlock_irq(&s->buf_lock);
		if (n == RRAM_MSG_DEPTH)
			break;
		msleep(20);
	}
}

/* Sends a message that is nothing but its type, if that is possible now. */
bool rram_say(struct rram_session *s, enum rram_msg_type type)
{
	if (!rram_can_send(s))
		return false;
	rram_msg_send(s, rram_msg_new(s, type), sizeof(struct rram_msg));
	return true;
}

/*
 * The next message that was received, with a header that is right. Anything
 * else breaks the connection.
 */
struct rram_buf *rram_msg_next(struct rram_session *s)
{
	struct rram_buf *b;
	struct rram_msg *msg;

	spin_lock_irq(&s->buf_lock);
	b = list_first_entry_or_null(&s->rx, struct rram_buf, list);
	if (b)
		list_del(&b->list);
	spin_unlock_irq(&s->buf_lock);
	if (!b)
		return NULL;
	s->last_rx = jiffies;
	msg = b->data;
	if (b->bytes < sizeof(*msg) || le32_to_cpu(msg->magic) != RRAM_MAGIC ||
	    le16_to_cpu(msg->bytes) != b->bytes || !msg->type ||
	    msg->type >= RRAM_MSG_TYPES ||
	    s->credits + msg->credit > RRAM_MSG_DEPTH) {
		pr_warn_ratelimited("remote_ram: malformed message header\n");
		WRITE_ONCE(s->broken, true);
		return NULL;
	}
	s->credits += msg->credit;
	return b;
}

/* Gives the buffer of a received message back to the queue pair. */
void rram_msg_done(struct rram_session *s, struct rram_buf *b)
{
	struct rram_msg *msg = b->data;
	bool counted = msg->type != RRAM_MSG_CREDIT;

	if (READ_ONCE(s->broken))
		return;
	if (rram_post_recv(s, b)) {
		WRITE_ONCE(s->broken, true);
		return;
	}
	if (counted)
		s->owed++;
	/*
	 * The peer may be waiting for credit and have nothing to say. The
	 * message that brings it costs none: receives are spared for it.
	 */
	if (s->owed >= RRAM_MSG_DEPTH / 2 && !list_empty_careful(&s->tx))
		rram_msg_send(s, rram_msg_new(s, RRAM_MSG_CREDIT),
			      sizeof(struct rram_msg));
}

/* -- Devices --------------------------------------------------------------- */

/* Sessions, for a device that goes: one may keep things on it without a link. */
static LIST_HEAD(rram_sessions);
static DEFINE_SPINLOCK(rram_sessions_lock);	/* and rram_session.dev */
static DECLARE_WAIT_QUEUE_HEAD(rram_sessions_wait);

static int rram_device_add(struct ib_device *dev);
static void rram_device_remove(struct ib_device *dev, void *data);

static struct ib_client rram_client = {
	.name = "remote_ram",
	.add = rram_device_add,
	.remove = rram_device_remove,
};

static int rram_device_add(struct ib_device *dev)
{
	/* As long as this is set the device may be used. */
	ib_set_client_data(dev, &rram_client, dev);
	return 0;
}

/* Whether no session is on a device; those that are, are told to leave. */
static bool rram_device_idle(struct ib_device *dev)
{
	struct rram_session *s;
	bool idle = true;

	spin_lock(&rram_sessions_lock);
	list_for_each_entry(s, &rram_sessions, sessions) {
		if (s->dev != dev)
			continue;
		idle = false;
		WRITE_ONCE(s->evicted, true);
		rram_poke(s);
	}
	spin_unlock(&rram_sessions_lock);
	return idle;
}

static void rram_device_remove(struct ib_device *dev, void *data)
{
	ib_set_client_data(dev, &rram_client, NULL);
	wait_event(rram_sessions_wait, rram_device_idle(dev));
}

void rram_list_session(struct rram_session *s)
{
	spin_lock(&rram_sessions_lock);
	list_add(&s->sessions, &rram_sessions);
	spin_unlock(&rram_sessions_lock);
}

void rram_unlist_session(struct rram_session *s)
{
	spin_lock(&rram_sessions_lock);
	list_del(&s->sessions);
	spin_unlock(&rram_sessions_lock);
}

int rram_link_init(void)
{
	return ib_register_client(&rram_client);
}

void rram_link_exit(void)
{
	ib_unregister_client(&rram_client);
}

/* -- Connections ---------------------------------------------------------- */

/* Gives up all that is kept on a device between two connections. */
void rram_leave_device(struct rram_session *s)
{
	if (!s->pd)
		return;
	if (s->role == RRAM_ROLE_SOURCE)
		rram_source_drop(s);
	ib_dealloc_pd(s->pd);
	s->pd = NULL;
	spin_lock(&rram_sessions_lock);
	s->dev = NULL;
	WRITE_ONCE(s->evicted, false);
	spin_unlock(&rram_sessions_lock);
	wake_up_all(&rram_sessions_wait);
}

/* Sees to it that there is a protection domain on the device. */
static int rram_use_device(struct rram_session *s, struct ib_device *dev)
{
	unsigned int kind;
	bool usable;

	if (s->pd && s->dev == dev)
		return 0;
	/* Both links are on one device, or a queue pair would lose its domain. */
	for (kind = 0; kind < RRAM_LINKS; kind++)
		if (s->pd && s->link[kind].id && s->link[kind].id->qp)
			return -EXDEV;
	rram_leave_device(s);
	if (!(dev->attrs.device_cap_flags & IB_DEVICE_MEM_MGT_EXTENSIONS) ||
	    !dev->attrs.max_qp_rd_atom)
		return -EOPNOTSUPP;
	/* A chunk has one key. */
	if (s->role == RRAM_ROLE_SOURCE &&
	    dev->attrs.max_fast_reg_page_list_len < RRAM_CHUNK_PAGES) {
		pr_warn_ratelimited("remote_ram: %s takes keys of %u pages, %lu are needed\n",
				    dev_name(&dev->dev),
				    dev->attrs.max_fast_reg_page_list_len,
				    (unsigned long)RRAM_CHUNK_PAGES);
		return -EOPNOTSUPP;
	}
	/* At the latest after the switch each chunk has a key. */
	if (s->role == RRAM_ROLE_SOURCE &&
	    s->f->npages >> RRAM_CHUNK_SHIFT >= dev->attrs.max_mr)
		return -ENOSPC;
	spin_lock(&rram_sessions_lock);
	usable = ib_get_client_data(dev, &rram_client);
	if (usable) {
		s->dev = dev;
		WRITE_ONCE(s->evicted, false);
	}
	spin_unlock(&rram_sessions_lock);
	if (!usable)
		return -ENODEV;		/* it is being removed */
	s->virt_dma = ib_uses_virt_dma(dev);
	s->pd = ib_alloc_pd(dev, 0);
	if (IS_ERR(s->pd)) {
		int err = PTR_ERR(s->pd);

		s->pd = NULL;
		spin_lock(&rram_sessions_lock);
		s->dev = NULL;
		spin_unlock(&rram_sessions_lock);
		wake_up_all(&rram_sessions_wait);
		return err;
	}
	return 0;
}

/*
 * The core has completions of the urgent link handled in a soft interrupt. Of
 * a device that tells of them from a thread, as software devices do, that is
 * left to ksoftirqd, which waits for its turn on the CPU. When bottom halves
 * are enabled again what is pending is done at once.
 */
static void rram_completion(struct ib_cq *cq, void *context)
{
	struct rram_session *s = context;
	bool thread = in_task() && !irqs_disabled();

	if (thread)
		local_bh_disable();
	s->link[RRAM_LINK_URGENT].complete(cq, context);
	if (thread)
		local_bh_enable();
}

static int rram_make_qp(struct rram_session *s, enum rram_link_kind kind)
{
	struct rram_link *l = &s->link[kind];
	struct ib_device *dev = l->id->device;
	bool bulk = kind == RRAM_LINK_BULK;
	struct ib_qp_init_attr attr = {
		.qp_type = IB_QPT_RC,
		.sq_sig_type = IB_SIGNAL_REQ_WR,
		.port_num = l->id->port_num,
	};
	unsigned int depth;
	int err;

	if (bulk) {
		attr.cap.max_send_wr = 2 * RRAM_MSG_DEPTH + 8;
		attr.cap.max_recv_wr = RRAM_MSG_DEPTH + RRAM_MSG_SPARE + 1;
		attr.cap.max_send_sge = clamp_t(u32, dev->attrs.max_sge_rd ?:
						dev->attrs.max_send_sge, 1, 32);
		attr.cap.max_recv_sge = 1;
		attr.cap.max_rdma_ctxs = RRAM_BULK_DEPTH *
			rdma_rw_mr_factor(dev, l->id->port_num, RRAM_BATCH_MAX);
		/* Without keys a READ takes as many requests as its pages do. */
		attr.cap.max_send_wr += RRAM_BULK_DEPTH *
			DIV_ROUND_UP(RRAM_BATCH_MAX, attr.cap.max_send_sge);
	} else {
		attr.cap.max_send_wr = RRAM_URGENT_DEPTH + 8;
		attr.cap.max_recv_wr = 1;
		attr.cap.max_send_sge = 1;
		attr.cap.max_recv_sge = 1;
		/* Noted, since the parameter may change meanwhile. */
		l->sink_keys = rram_needs_sink_key(dev);
		if (l->sink_keys)
			attr.cap.max_rdma_ctxs = RRAM_URGENT_DEPTH;
	}
	attr.cap.max_send_wr = min_t(u32, attr.cap.max_send_wr,
				     dev->attrs.max_qp_wr);
	depth = attr.cap.max_send_wr + attr.cap.max_recv_wr +
		3 * attr.cap.max_rdma_ctxs;
	l->cq = ib_alloc_cq(dev, s, min_t(unsigned int, depth, dev->attrs.max_cqe),
			    bulk ? 1 % dev->num_comp_vectors : 0,
			    bulk ? IB_POLL_WORKQUEUE : IB_POLL_SOFTIRQ);
	if (IS_ERR(l->cq)) {
		err = PTR_ERR(l->cq);
		l->cq = NULL;
		return err;
	}
	if (!bulk) {
		/* No queue pair uses it yet, so nothing calls it. */
		l->complete = l->cq->comp_handler;
		l->cq->comp_handler = rram_completion;
	}
	attr.send_cq = l->cq;
	attr.recv_cq = l->cq;
	err = rdma_create_qp(l->id, s->pd, &attr);
	if (err)
		return err;
	return bulk ? rram_make_bufs(s) : 0;
}

/* Every READ and every message of a link has ended after this. */
static void rram_drain(struct rram_session *s, enum rram_link_kind kind)
{
	struct rdma_cm_id *id = s->link[kind].id;

	rdma_disconnect(id);
	ib_drain_qp(id->qp);
	if (s->role == RRAM_ROLE_DESTINATION)
		rram_dest_sweep(s, kind, id->qp);
}

/*
 * Ends all that is under way on a connection, for the thread that has to wait
 * for it. The connection is taken down later.
 */
void rram_break(struct rram_session *s)
{
	unsigned int kind;

	WRITE_ONCE(s->broken, true);
	/* A fault that has not seen it yet has posted its READ after this. */
	down_write(&s->linksem);
	up_write(&s->linksem);
	for (kind = 0; kind < RRAM_LINKS; kind++) {
		struct rdma_cm_id *id = s->link[kind].id;

		if (id && id->qp)
			rram_drain(s, kind);
	}
}

static void rram_link_destroy(struct rram_session *s, enum rram_link_kind kind)
{
	struct rram_link *l = &s->link[kind];

	if (!l->id)
		return;
	if (l->id->qp) {
		rram_drain(s, kind);
		rdma_destroy_qp(l->id);
	}
	if (l->cq)
		ib_free_cq(l->cq);
	if (kind == RRAM_LINK_BULK)
		rram_free_bufs(s);
	rdma_destroy_id(l->id);
	memset(l, 0, sizeof(*l));
	l->s = s;
}

void rram_unlink(struct rram_session *s)
{
	unsigned int kind;

	/* No fault posts a READ after this. */
	down_write(&s->linksem);
	s->linked = false;
	up_write(&s->linksem);
	for (kind = 0; kind < RRAM_LINKS; kind++)
		rram_link_destroy(s, kind);
	s->broken = false;
	if (s->role == RRAM_ROLE_DESTINATION)
		rram_dest_drop(s);
	else
		rram_source_unlinked(s);
	rram_wake_pages(s->f);
}

static void rram_linked(struct rram_session *s)
{
	s->last_rx = jiffies;
	s->last_tx = jiffies;
	down_write(&s->linksem);
	s->linked = true;
	up_write(&s->linksem);
	if (s->epoch > 1)
		atomic64_inc(&s->count.reconnects);
	if (s->role == RRAM_ROLE_SOURCE)
		rram_source_linked(s);
	else
		rram_dest_linked(s);
	rram_set_state(s, rram_get_state(s, NULL) == RRAM_STATE_RECONNECTING ?
			  RRAM_STATE_POSTCOPY : RRAM_STATE_CONNECTED,
		       RRAM_REASON_NONE);
	rram_wake_pages(s->f);
}

/* Waits, as the session's thread, until a link has got so far. */
static int rram_await_stage(struct rram_link *l, int stage)
{
	struct rram_session *s = l->s;
	unsigned long end = jiffies + msecs_to_jiffies(RRAM_STEP_MS);

	while (READ_ONCE(l->stage) != stage) {
		/* Pairs with rram_link_note(): then the reason is there. */
		if (smp_load_acquire(&l->failed))
			return -ECONNREFUSED;
		if (READ_ONCE(s->aborted) || READ_ONCE(s->evicted) ||
		    time_after(jiffies, end)) {
			l->reason = RRAM_REASON_TIMEOUT;
			return -ETIMEDOUT;
		}
		wait_event_interruptible_timeout(s->wake,
						 atomic_xchg(&s->poke, 0),
						 HZ / 20);
	}
	return 0;
}

static int rram_connect_link(struct rram_session *s, enum rram_link_kind kind)
{
	struct sockaddr *addr = (struct sockaddr *)s->args.addr;
	struct rram_link *l = &s->link[kind];
	struct rram_hello hello = {
		.magic = cpu_to_le32(RRAM_MAGIC),
		.version = cpu_to_le16(RRAM_WIRE_VERSION),
		.link = kind,
		.bytes = cpu_to_le64((u64)s->f->npages << PAGE_SHIFT),
		.epoch = cpu_to_le32(s->epoch),
		.nonce = cpu_to_le64(get_random_u64()),
	};
	struct rdma_conn_param param = {
		.private_data = &hello,
		.private_data_len = sizeof(hello),
		.retry_count = 7,
		.rnr_retry_count = 7,
	};
	int err;

	memset(l, 0, sizeof(*l));
	l->s = s;
	l->stage = -1;
	memcpy(hello.uuid, s->args.uuid, RRAM_UUID_LEN);
	hello.proof = rram_proof(s, &hello, RRAM_ROLE_SOURCE);
	l->proof = rram_proof(s, &hello, RRAM_ROLE_DESTINATION);
	l->id = rdma_create_id(s->net, rram_link_event, l, RDMA_PS_TCP,
			       IB_QPT_RC);
	if (IS_ERR(l->id)) {
		err = PTR_ERR(l->id);
		l->id = NULL;
		return err;
	}
	l->reason = RRAM_REASON_UNREACHABLE;
	err = rdma_resolve_addr(l->id, NULL, addr, RRAM_STEP_MS);
	err = err ?: rram_await_stage(l, RDMA_CM_EVENT_ADDR_RESOLVED);
	err = err ?: rdma_resolve_route(l->id, RRAM_STEP_MS);
	err = err ?: rram_await_stage(l, RDMA_CM_EVENT_ROUTE_RESOLVED);
	if (err)
		return err;
	l->reason = RRAM_REASON_DEVICE;
	err = rram_use_device(s, l->id->device);
	err = err ?: rram_make_qp(s, kind);
	if (err)
		return err;
	/* The destination READs, this side answers. */
	param.responder_resources = clamp(s->dev->attrs.max_qp_rd_atom, 1, 128);
	param.initiator_depth = 1;
	l->reason = RRAM_REASON_UNREACHABLE;
	/* siw waits for TCP here, which takes minutes to give up. */
	schedule_delayed_work(&s->hurry, msecs_to_jiffies(RRAM_STEP_MS));
	err = rdma_connect(l->id, &param);
	cancel_delayed_work_sync(&s->hurry);
	flush_signals(current);
	return err ?: rram_await_stage(l, RDMA_CM_EVENT_ESTABLISHED);
}

/*
 * Connects, as a source. One attempt after the switch, when the thread comes
 * back here anyway; before it, as often as the time allows, unless the
 * destination says no.
 */
int rram_connect(struct rram_session *s)
{
	unsigned long end = jiffies + msecs_to_jiffies(s->args.connect_ms);
	bool again = rram_get_state(s, NULL) == RRAM_STATE_RECONNECTING;
	unsigned int kind;
	int err = 0, reason;

	for (;;) {
		s->epoch++;
		reason = RRAM_REASON_NONE;
		for (kind = 0; kind < RRAM_LINKS; kind++) {
			err = rram_connect_link(s, kind);
			if (err) {
				reason = s->link[kind].reason ?:
					 RRAM_REASON_UNREACHABLE;
				break;
			}
		}
		if (!err) {
			s->pause = 0;
			rram_linked(s);
			return 0;
		}
		rram_unlink(s);
		rram_set_state(s, again ? RRAM_STATE_RECONNECTING :
					  RRAM_STATE_CONNECTING, reason);
		s->pause = clamp(2 * s->pause, RRAM_PAUSE_MS, RRAM_PAUSE_MOST);
		if (again || READ_ONCE(s->aborted) ||
		    time_after(jiffies, end) ||
		    (reason != RRAM_REASON_UNREACHABLE &&
		     reason != RRAM_REASON_TIMEOUT &&
		     reason != RRAM_REASON_BUSY))
			break;
		wait_event_interruptible_timeout(s->wake,
						 READ_ONCE(s->aborted),
						 msecs_to_jiffies(s->pause));
	}
	if (again)
		/* Not without a break; a destination's word is not final. */
		wait_event_interruptible_timeout(s->wake, READ_ONCE(s->aborted),
						 msecs_to_jiffies(s->pause));
	return err;
}

/* Why a request has to be refused; 0 if it must not. */
static int rram_judge(struct rram_session *s, const struct rram_hello *h)
{
	enum rram_state state = rram_get_state(s, NULL);
	__le64 proof = rram_proof(s, h, RRAM_ROLE_SOURCE);

	if (le32_to_cpu(h->magic) != RRAM_MAGIC || h->link >= RRAM_LINKS ||
	    h->flags)
		return RRAM_REASON_PROTOCOL;
	if (le16_to_cpu(h->version) != RRAM_WIRE_VERSION)
		return RRAM_REASON_VERSION;
	if (memcmp(h->uuid, s->args.uuid, RRAM_UUID_LEN))
		return RRAM_REASON_UUID;
	/* Says nothing by the time it takes. */
	if (crypto_memneq(&h->proof, &proof, sizeof(proof)))
		return RRAM_REASON_TOKEN;
	/* Said before: by a source that begins anew, or by who has listened in. */
	if (le32_to_cpu(h->epoch) <= s->came[h->link])
		return RRAM_REASON_BUSY;
	if (le64_to_cpu(h->bytes) != (u64)s->f->npages << PAGE_SHIFT)
		return RRAM_REASON_SIZE;
	/* Who has not heard yet that all is in may come and be told. */
	if (rram_ended(state) && state != RRAM_STATE_COMPLETE)
		return RRAM_REASON_STATE;
	/* The peer has noticed earlier than we that the connection is gone. */
	if (s->linked &&
	    (rram_switched(state) || state == RRAM_STATE_COMPLETE) &&
	    le32_to_cpu(h->epoch) > s->epoch) {
		rram_unlink(s);
		s->lost_at = jiffies;
		rram_set_state(s, RRAM_STATE_RECONNECTING,
			       RRAM_REASON_DISCONNECTED);
	}
	if (s->linked)
		return RRAM_REASON_BUSY;
	return 0;
}

static void rram_reject(struct rdma_cm_id *id, int reason)
{
	struct rram_answer answer = {
		.magic = cpu_to_le32(RRAM_MAGIC),
		.version = cpu_to_le16(RRAM_WIRE_VERSION),
		.reason = cpu_to_le16(reason),
	};

	rdma_reject(id, &answer, sizeof(answer), IB_CM_REJ_CONSUMER_DEFINED);
	rdma_destroy_id(id);
}

static int rram_accept(struct rram_session *s, struct rram_request *r)
{
	struct rram_answer answer = {
		.magic = cpu_to_le32(RRAM_MAGIC),
		.version = cpu_to_le16(RRAM_WIRE_VERSION),
		.proof = rram_proof(s, &r->hello, RRAM_ROLE_DESTINATION),
	};
	struct rram_link *l = &s->link[r->hello.link];
	struct rdma_conn_param param = {
		.private_data = &answer,
		.private_data_len = sizeof(answer),
		.responder_resources = 1,
		.rnr_retry_count = 7,
	};
	int err;

	memset(l, 0, sizeof(*l));
	l->s = s;
	l->stage = -1;
	l->id = r->id;
	/* An event between the two lines finds a context of the other kind. */
	rdma_lock_handler(r->id);
	r->id->context = l;
	r->id->event_handler = rram_link_event;
	rdma_unlock_handler(r->id);
	err = rram_use_device(s, r->id->device);
	err = err ?: rram_make_qp(s, r->hello.link);
	if (err)
		return err;
	param.initiator_depth = clamp(min_t(int, r->depth,
					    s->dev->attrs.max_qp_init_rd_atom),
				      1, 128);
	/* It may be taken back, or the device go, until this has been said. */
	rdma_lock_handler(r->id);
	err = r->gone ? -ECONNRESET : rdma_accept(r->id, &param);
	rdma_unlock_handler(r->id);
	return err ?: rram_await_stage(l, RDMA_CM_EVENT_ESTABLISHED);
}

/* Looks at those who want to connect, as a destination. */
void rram_serve_requests(struct rram_session *s)
{
	struct rram_request *r;
	struct rram_link *other;
	int reason;

	for (;;) {
		spin_lock(&s->state_lock);
		r = list_first_entry_or_null(&s->requests, struct rram_request,
					     list);
		if (r)
			list_del(&r->list);
		spin_unlock(&s->state_lock);
		if (!r)
			return;
		reason = rram_judge(s, &r->hello);
		if (reason) {
			pr_info_ratelimited("remote_ram: a source was refused, reason %d\n",
					    reason);
			rram_reject(r->id, reason);
			kfree(r);
			/* For who waits here and wonders why nobody comes. */
			if (!s->linked)
				rram_set_state(s, rram_get_state(s, NULL),
					       reason);
			continue;
		}
		other = &s->link[!r->hello.link];
		/* A first link of another attempt, or of the same kind again. */
		if (s->link[r->hello.link].id ||
		    (other->id && le32_to_cpu(r->hello.epoch) != s->epoch))
			rram_unlink(s);
		s->epoch = le32_to_cpu(r->hello.epoch);
		s->came[r->hello.link] = s->epoch;
		if (rram_accept(s, r)) {
			rram_unlink(s);
		} else if (s->link[0].up && s->link[1].up &&
			   !s->link[0].failed && !s->link[1].failed) {
			rram_linked(s);
		}
		kfree(r);
	}
}

/* Gives and expects signs of life. Returns false if there are none. */
bool rram_check_link(struct rram_session *s)
{
	if (READ_ONCE(s->broken) || READ_ONCE(s->link[0].failed) ||
	    READ_ONCE(s->link[1].failed))
		return false;
	if (time_after(jiffies, s->last_tx +
				msecs_to_jiffies(s->args.heartbeat_ms)))
		rram_say(s, RRAM_MSG_PING);
	/* Signs of life take the other connection. */
	if (s->role == RRAM_ROLE_DESTINATION && rram_dest_stuck(s))
		return false;
	return !time_after(jiffies, s->last_rx +
				    msecs_to_jiffies(s->args.dead_ms));
}

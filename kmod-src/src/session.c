// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * A session: its states, its thread, its beginning and its end.
 *
 * All that a session does is done by its thread, in turns, except for two
 * things: a fault posts its own READ, and a completion finishes one. So no
 * lock is needed for most of it.
 */
#include <linux/kthread.h>
#include <linux/nsproxy.h>
#include <linux/sched/signal.h>
#include <net/net_namespace.h>

#include "remote_ram.h"
#include "trace.h"

static void rram_session_release(struct kref *ref)
{
	struct rram_session *s = container_of(ref, struct rram_session, ref);

	if (s->role == RRAM_ROLE_SOURCE)
		rram_source_free(s);
	else
		rram_dest_free(s);
	put_net(s->net);
	memzero_explicit(s->args.token, sizeof(s->args.token));
	kfree_rcu(s, rcu);
}

void rram_session_put(struct rram_session *s)
{
	kref_put(&s->ref, rram_session_release);
}

struct rram_session *rram_session_get(struct rram_file *f)
{
	struct rram_session *s;

	rcu_read_lock();
	s = rcu_dereference(f->session);
	if (s && !kref_get_unless_zero(&s->ref))
		s = NULL;
	rcu_read_unlock();
	return s;
}

bool rram_ended(enum rram_state state)
{
	return state == RRAM_STATE_COMPLETE || state == RRAM_STATE_FAILED ||
	       state == RRAM_STATE_LOST || state == RRAM_STATE_NONE;
}

bool rram_switched(enum rram_state state)
{
	return state == RRAM_STATE_POSTCOPY ||
	       state == RRAM_STATE_RECONNECTING;
}

enum rram_state rram_get_state(struct rram_session *s, enum rram_reason *reason)
{
	enum rram_state state;

	spin_lock(&s->state_lock);
	state = s->state;
	if (reason)
		*reason = s->reason;
	spin_unlock(&s->state_lock);
	return state;
}

/* The only place where a state changes. What has ended stays ended. */
void rram_set_state(struct rram_session *s, enum rram_state state,
		    enum rram_reason reason)
{
	spin_lock(&s->state_lock);
	if (!rram_ended(s->state) || s->state == RRAM_STATE_NONE) {
		trace_rram_state(s->f, s->role, s->state, state, reason);
		s->state = state;
		/* Why a connection was refused is still worth knowing. */
		if (reason || state != RRAM_STATE_CONNECTING)
			s->reason = reason;
	}
	spin_unlock(&s->state_lock);
	wake_up_all(&s->changed);
}

void rram_poke(struct rram_session *s)
{
	atomic_set(&s->poke, 1);
	wake_up(&s->wake);
}

static bool rram_in_states(struct rram_session *s, u32 states)
{
	enum rram_state state = rram_get_state(s, NULL);

	return states & BIT(state) || rram_ended(state);
}

/* Waits for a state: 0, -ETIMEDOUT or -EINTR. ~0 ms is for ever. */
int rram_wait_state(struct rram_session *s, u32 states, unsigned int ms)
{
	long timeout = ms == ~0U ? MAX_SCHEDULE_TIMEOUT : msecs_to_jiffies(ms);
	long left = wait_event_interruptible_timeout(s->changed,
						     rram_in_states(s, states),
						     timeout);

	if (left < 0)
		return -EINTR;
	return left ? 0 : -ETIMEDOUT;
}

/* Whether the bandwidth limit forbids so many bytes now; if not, takes them. */
bool rram_throttled(struct rram_session *s, u64 bytes)
{
	u64 rate = READ_ONCE(s->args.bandwidth);
	ktime_t now;
	s64 burst;

	if (!rate)
		return false;
	now = ktime_get();
	/* A tenth of a second's worth, but at least what is asked for. */
	burst = max_t(s64, div_u64(rate, 10), bytes);
	s->tokens += div_u64(rate * min_t(u64, NSEC_PER_SEC,
					  ktime_sub(now, s->tokens_at)) >> 10,
			     NSEC_PER_SEC >> 10);
	s->tokens_at = now;
	s->tokens = min(s->tokens, burst);
	if (s->tokens < (s64)min_t(u64, bytes, burst))
		return true;
	s->tokens -= bytes;
	return false;
}

/* Gives back what was taken for bytes that were not moved. */
void rram_unthrottle(struct rram_session *s, u64 bytes)
{
	s->tokens += bytes;
}

/* Tells the peer that this side has given up, if that is possible. */
static void rram_say_abort(struct rram_session *s)
{
	struct rram_msg_abort *m;
	struct rram_buf *b;

	if (!s->linked || !rram_can_send(s))
		return;
	b = rram_msg_new(s, RRAM_MSG_ABORT);
	m = b->data;
	m->reason = cpu_to_le32(s->reason == RRAM_REASON_NO_MEMORY ?
				RRAM_REASON_NO_MEMORY : RRAM_REASON_ABORTED);
	rram_msg_send(s, b, sizeof(*m));
	rram_msg_flush(s);
}

/*
 * Ends a session that can't go on. Before the switch that is a failure; after
 * it pages are lost.
 */
void rram_fail(struct rram_session *s, enum rram_reason reason)
{
	enum rram_state state = rram_get_state(s, NULL);
	bool after = rram_switched(state);

	/* A destination that has all pages keeps them, whatever its peer says. */
	if (rram_ended(state))
		return;
	rram_set_state(s, after ? RRAM_STATE_LOST : RRAM_STATE_FAILED, reason);
	if (s->role != RRAM_ROLE_DESTINATION)
		return;
	if (!after) {
		if (reason != RRAM_REASON_PEER_ABORTED)
			rram_say_abort(s);
		/*
		 * A fault may hold the semaphore that is taken next and wait
		 * for a folio that is being READ.
		 */
		rram_break(s);
	}
	rram_dest_end(s, after);
}

/* Deals with what the peer said. Returns false once there is a reason to end. */
static bool rram_messages(struct rram_session *s)
{
	struct rram_msg_abort *abort;
	unsigned int n = 0;
	struct rram_buf *b;
	bool fine = true;

	while (fine && n < RRAM_MSG_DEPTH && (b = rram_msg_next(s))) {
		struct rram_msg *msg = b->data;

		switch (msg->type) {
		case RRAM_MSG_CREDIT:
		case RRAM_MSG_PING:
			break;
		case RRAM_MSG_ABORT:
			abort = b->data;
			fine = false;
			/* After the switch: a source that took the VM back. */
			rram_fail(s, b->bytes < sizeof(*abort) ?
				     RRAM_REASON_PROTOCOL :
				     le32_to_cpu(abort->reason) ==
				     RRAM_REASON_NO_MEMORY ?
				     RRAM_REASON_NO_MEMORY :
				     RRAM_REASON_PEER_ABORTED);
			break;
		default:
			fine = s->role == RRAM_ROLE_SOURCE ?
			       rram_source_message(s, b) :
			       rram_dest_message(s, b);
			if (!fine && READ_ONCE(s->broken)) {
				/* No fault of the message. */
				fine = true;
			} else if (!fine && !rram_ended(s->state)) {
				/*
				 * After the switch a peer that talks nonsense
				 * is a broken connection: there may be a better
				 * one.
				 */
				pr_warn_ratelimited("remote_ram: malformed message of type %u\n",
						    msg->type);
				if (rram_switched(s->state)) {
					s->broken = true;
					fine = true;
				} else {
					rram_fail(s, RRAM_REASON_PROTOCOL);
				}
			}
		}
		rram_msg_done(s, b);
		n++;
		if (s->broken)
			break;
	}
	/* One who never stops talking does not keep the thread from the rest. */
	if (n == RRAM_MSG_DEPTH)
		rram_poke(s);
	return fine;
}

/* Takes a broken connection down and decides what that means. */
static void rram_lost_link(struct rram_session *s)
{
	enum rram_state state = rram_get_state(s, NULL);
	bool gone = READ_ONCE(s->evicted) ||
		    s->link[RRAM_LINK_URGENT].reason == RRAM_REASON_DEVICE ||
		    s->link[RRAM_LINK_BULK].reason == RRAM_REASON_DEVICE;

	rram_unlink(s);
	if (gone)
		rram_leave_device(s);
	if (rram_ended(state))
		return;
	if (!rram_switched(state)) {
		rram_fail(s, RRAM_REASON_DISCONNECTED);
		return;
	}
	s->lost_at = jiffies;
	rram_set_state(s, RRAM_STATE_RECONNECTING, RRAM_REASON_DISCONNECTED);
}

static bool rram_patience_is_over(struct rram_session *s)
{
	return s->args.reconnect_ms != ~0U &&
	       time_after(jiffies, s->lost_at +
				   msecs_to_jiffies(s->args.reconnect_ms));
}

/* One turn of the thread. Returns true if there is more to do at once. */
static bool rram_turn(struct rram_session *s)
{
	enum rram_state state;
	bool more = false;

	if (s->role == RRAM_ROLE_DESTINATION) {
		if (READ_ONCE(s->deaf)) {
			/* The address may be on another device by now. */
			rram_unlisten(s);
			WRITE_ONCE(s->deaf, rram_listen(s) != 0);
		}
		rram_serve_requests(s);
	}
	if (s->linked) {
		if (!rram_messages(s))
			return false;
		/* A registration may have ended that a message waits for. */
		rram_msg_push(s);
		if (!s->broken) {
			more = s->role == RRAM_ROLE_SOURCE ?
			       rram_source_step(s) : rram_dest_step(s);
		}
		if (!rram_check_link(s) || s->broken)
			rram_lost_link(s);
	}
	if (READ_ONCE(s->evicted)) {
		if (s->linked) {
			rram_lost_link(s);
		} else {
			/* Keys and their pages may have outlived a connection. */
			rram_unlink(s);
			rram_leave_device(s);
		}
	}
	state = rram_get_state(s, NULL);
	if (state == RRAM_STATE_RECONNECTING) {
		if (rram_patience_is_over(s))
			rram_fail(s, RRAM_REASON_TIMEOUT);
		else if (s->role == RRAM_ROLE_SOURCE)
			rram_connect(s);
	}
	return more;
}

/* The thread waits inside somebody else's code, and has waited enough. */
static void rram_hurry(struct work_struct *work)
{
	struct rram_session *s = container_of(work, struct rram_session,
					      hurry.work);

	send_sig(SIGINT, s->thread, 1);
}

static int rram_thread(void *data)
{
	struct rram_session *s = data;
	enum rram_state state;
	bool more = false, said = false;

	allow_kernel_signal(SIGINT);	/* from rram_hurry() alone */
	if (s->role == RRAM_ROLE_SOURCE) {
		rram_connect(s);
		if (!s->linked)
			rram_fail(s, s->reason ?: RRAM_REASON_UNREACHABLE);
	}
	while (!kthread_should_stop()) {
		if (!more)
			wait_event_interruptible_timeout(s->wake,
							 atomic_xchg(&s->poke, 0) ||
							 kthread_should_stop(),
							 RRAM_TICK);
		state = rram_get_state(s, NULL);
		if (state == RRAM_STATE_COMPLETE &&
		    s->role == RRAM_ROLE_DESTINATION && rram_dest_lingers(s)) {
			rram_turn(s);
			continue;
		}
		if (rram_ended(state))
			break;
		if (READ_ONCE(s->aborted) && !READ_ONCE(s->taken_back) &&
		    s->role == RRAM_ROLE_SOURCE && rram_switched(state)) {
			/* Asked for too late: the VM runs over there. */
			WRITE_ONCE(s->aborted, false);
			wake_up_all(&s->changed);
		}
		if (READ_ONCE(s->aborted)) {
			if (s->role == RRAM_ROLE_SOURCE || rram_switched(state))
				rram_say_abort(s);
			said = true;
			if (s->taken_back)
				rram_set_state(s, RRAM_STATE_FAILED,
					       RRAM_REASON_ABORTED);
			else
				rram_fail(s, RRAM_REASON_ABORTED);
			break;
		}
		more = rram_turn(s);
		cond_resched();
	}
	/* A peer that has switched meanwhile must learn that it must not run. */
	if (!said && rram_get_state(s, NULL) == RRAM_STATE_FAILED)
		rram_say_abort(s);
	/* Said goodbye, aborted, or about to be destroyed. */
	if (s->linked)
		rram_msg_flush(s);
	rram_unlink(s);
	rram_unlisten(s);
	if (s->role == RRAM_ROLE_SOURCE)
		rram_source_drop(s);
	rram_leave_device(s);
	if (s->role == RRAM_ROLE_DESTINATION &&
	    !rram_ended(rram_get_state(s, NULL)))
		rram_fail(s, RRAM_REASON_ABORTED);
	else if (!rram_ended(rram_get_state(s, NULL)))
		rram_set_state(s, RRAM_STATE_FAILED, RRAM_REASON_ABORTED);
	rram_wake_pages(s->f);
	/* Pairs with rram_source_switch(): who sees it sees all of the above. */
	smp_store_release(&s->over, true);
	wake_up_all(&s->changed);
	while (!kthread_should_stop())
		wait_event_interruptible(s->wake, kthread_should_stop());
	return 0;
}

/* Makes a session that nobody finds yet. The caller holds f->control. */
struct rram_session *rram_session_new(struct rram_file *f, enum rram_role role,
				      struct rram_session_args *args)
{
	struct rram_session *s = kzalloc(sizeof(*s), GFP_KERNEL);
	int err;

	if (!s)
		return ERR_PTR(-ENOMEM);
	kref_init(&s->ref);
	s->f = f;
	s->role = role;
	spin_lock_init(&s->state_lock);
	spin_lock_init(&s->buf_lock);
	init_waitqueue_head(&s->wake);
	init_waitqueue_head(&s->changed);
	init_rwsem(&s->linksem);
	INIT_DELAYED_WORK(&s->hurry, rram_hurry);
	INIT_LIST_HEAD(&s->requests);
	INIT_LIST_HEAD(&s->tx);
	INIT_LIST_HEAD(&s->rx);
	INIT_LIST_HEAD(&s->unsent);
	s->net = get_net(current->nsproxy->net_ns);
	s->args = *args;
	s->batch = 32;
	s->background = true;
	s->tokens_at = ktime_get();
	s->busy_poll_us = READ_ONCE(rram_busy_poll_us);
	err = role == RRAM_ROLE_SOURCE ? rram_source_new(s) : rram_dest_new(s);
	if (err)
		goto put;
	s->thread = kthread_create(rram_thread, s, "rram/%s",
				   role == RRAM_ROLE_SOURCE ? "src" : "dst");
	if (IS_ERR(s->thread)) {
		err = PTR_ERR(s->thread);
		goto put;
	}
	rram_debug_add(s);
	return s;
put:
	rram_session_put(s);
	return ERR_PTR(err);
}

/* Forgets a session that was not started. */
void rram_session_cancel(struct rram_session *s)
{
	rram_debug_remove(s);
	rram_unlisten(s);
	kthread_stop(s->thread);
	rram_session_put(s);
}

/* Publishes a session and starts its thread. Does not sleep. */
void rram_session_start(struct rram_session *s)
{
	rram_list_session(s);
	rcu_assign_pointer(s->f->session, s);
	wake_up_process(s->thread);
}

/*
 * Ends and forgets the session of a file. Waits for its thread; faults that
 * are still waiting find out by themselves. The caller holds f->control, or is
 * the last who knows the file.
 */
void rram_session_end(struct rram_file *f)
{
	struct rram_session *s = rcu_dereference_protected(f->session, true);

	if (!s)
		return;
	rram_debug_remove(s);
	WRITE_ONCE(s->aborted, true);
	rram_poke(s);
	kthread_stop(s->thread);
	rram_unlist_session(s);
	RCU_INIT_POINTER(f->session, NULL);
	rram_wake_pages(f);
	wake_up_all(&s->changed);
	rram_session_put(s);
}

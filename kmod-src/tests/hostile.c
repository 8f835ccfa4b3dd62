// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * A peer that does whatever it is told, for tests of what remote_ram makes of
 * peers that are not to be trusted. Knows nothing of the protocol.
 *
 * Takes commands from standard input and answers each with a line of JSON. LINK
 * is 0 or 1, HEX may be "-" for nothing, numbers may be 0x...
 *
 *   connect LINK ADDRESS PORT HEX   private data; {"connected", "answer"}
 *   listen ADDRESS                  {"port"}
 *   await                           the next that connects; {"hello"}
 *   accept LINK HEX                 that one; {"accepted": true}
 *   reject HEX                      that one; {"rejected": true}
 *   send LINK HEX                   {"status"}
 *   invalidate LINK RKEY HEX        SEND with invalidate; {"status"}
 *   recv LINK MS                    {"message"}: hex, or null; {"gone": true}
 *   read LINK RKEY ADDRESS BYTES    {"status", "data"}
 *   write LINK RKEY ADDRESS HEX     {"status"}
 *   close LINK                      {"closed": true}
 *
 * A status is of ibv_wc_status_str(), or "timeout". Its argument is how long it
 * waits for what has to come, in ms.
 */
#include <errno.h>
#include <netdb.h>
#include <poll.h>
#include <rdma/rdma_cma.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define LINKS 2
#define ROOM 8192		/* of a message; the protocol's are smaller */
#define RECEIVES 128

struct link {
	struct rdma_event_channel *events;
	struct rdma_cm_id *id;
	struct ibv_pd *pd;
	struct ibv_cq *send_cq, *recv_cq;
	struct ibv_mr *mr;
	char *memory;		/* receives, then one buffer to send from */
};

static int patience_ms = 5000;
static struct link links[LINKS];
static struct rdma_event_channel *listening;
static struct rdma_cm_id *listener;
static struct rdma_cm_id *waiting;	/* it wants to connect */

static void hex(const void *data, size_t bytes)
{
	const unsigned char *byte = data;

	putchar('"');
	while (bytes--)
		printf("%02x", *byte++);
	putchar('"');
}

static size_t unhex(const char *text, char *to)
{
	size_t n = 0;
	unsigned int byte;

	for (; n < ROOM && sscanf(text + 2 * n, "%2x", &byte) == 1; n++)
		to[n] = byte;
	return n;
}

static long now_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

/* The next event of a channel, NULL if none comes. */
static struct rdma_cm_event *next_event(struct rdma_event_channel *channel)
{
	struct pollfd fd = { .fd = channel->fd, .events = POLLIN };
	struct rdma_cm_event *event;

	if (poll(&fd, 1, patience_ms) <= 0 || rdma_get_cm_event(channel, &event))
		return NULL;
	return event;
}

static bool failed(const char *what)
{
	printf("{\"error\": \"%s: %s\"}\n", what, strerror(errno));
	return false;
}

static void drop(struct link *l)
{
	if (!l->id)
		return;
	rdma_disconnect(l->id);
	if (l->id->qp)
		rdma_destroy_qp(l->id);
	if (l->mr)
		ibv_dereg_mr(l->mr);
	if (l->send_cq)
		ibv_destroy_cq(l->send_cq);
	if (l->recv_cq)
		ibv_destroy_cq(l->recv_cq);
	if (l->pd)
		ibv_dealloc_pd(l->pd);
	free(l->memory);
	rdma_destroy_id(l->id);
	rdma_destroy_event_channel(l->events);
	memset(l, 0, sizeof(*l));
}

static char *sending(struct link *l)
{
	return l->memory + RECEIVES * ROOM;
}

static int post_recv(struct link *l, unsigned long slot)
{
	struct ibv_sge sge = {
		.addr = (uintptr_t)l->memory + slot * ROOM,
		.length = ROOM,
		.lkey = l->mr->lkey,
	};
	struct ibv_recv_wr *bad, wr = { .wr_id = slot, .sg_list = &sge, .num_sge = 1 };

	return ibv_post_recv(l->id->qp, &wr, &bad);
}

static bool make_qp(struct link *l)
{
	struct ibv_qp_init_attr attr = {
		.cap = {
			.max_send_wr = 16,
			.max_recv_wr = RECEIVES,
			.max_send_sge = 1,
			.max_recv_sge = 1,
		},
		.qp_type = IBV_QPT_RC,
		.sq_sig_all = 1,
	};
	unsigned long slot;

	l->pd = ibv_alloc_pd(l->id->verbs);
	l->memory = calloc(RECEIVES + 1, ROOM);
	if (!l->pd || !l->memory)
		return failed("memory");
	l->mr = ibv_reg_mr(l->pd, l->memory, (RECEIVES + 1) * ROOM, IBV_ACCESS_LOCAL_WRITE);
	l->send_cq = ibv_create_cq(l->id->verbs, 32, NULL, NULL, 0);
	l->recv_cq = ibv_create_cq(l->id->verbs, RECEIVES, NULL, NULL, 0);
	attr.send_cq = l->send_cq;
	attr.recv_cq = l->recv_cq;
	if (!l->mr || !l->send_cq || !l->recv_cq || rdma_create_qp(l->id, l->pd, &attr))
		return failed("queue pair");
	for (slot = 0; slot < RECEIVES; slot++)
		if (post_recv(l, slot))
			return failed("receive");
	return true;
}

static struct rdma_conn_param param_of(const char *data, size_t bytes)
{
	return (struct rdma_conn_param){
		.private_data = data,
		.private_data_len = bytes,
		.responder_resources = 16,
		.initiator_depth = 16,
		.retry_count = 3,
		.rnr_retry_count = 3,
	};
}

static bool step(struct link *l, int err, enum rdma_cm_event_type type)
{
	struct rdma_cm_event *event;
	bool right;

	if (err)
		return failed("address");
	event = next_event(l->events);
	right = event && event->event == type;
	if (!right)
		printf("{\"error\": \"%s instead of %s\"}\n",
		       event ? rdma_event_str(event->event) : "nothing",
		       rdma_event_str(type));
	if (event)
		rdma_ack_cm_event(event);
	return right;
}

static void do_connect(struct link *l, const char *address, const char *port,
		       const char *data, size_t bytes)
{
	struct addrinfo *to, hints = { .ai_socktype = SOCK_STREAM };
	struct rdma_conn_param param = param_of(data, bytes);
	struct rdma_cm_event *event;
	bool connected;

	drop(l);
	if (getaddrinfo(address, port, &hints, &to)) {
		failed(address);
		return;
	}
	l->events = rdma_create_event_channel();
	if (!l->events || rdma_create_id(l->events, &l->id, NULL, RDMA_PS_TCP)) {
		failed("rdma_cm");
		exit(1);
	}
	if (!step(l, rdma_resolve_addr(l->id, NULL, to->ai_addr, patience_ms),
		  RDMA_CM_EVENT_ADDR_RESOLVED) ||
	    !step(l, rdma_resolve_route(l->id, patience_ms),
		  RDMA_CM_EVENT_ROUTE_RESOLVED) ||
	    !make_qp(l))
		goto out;
	if (rdma_connect(l->id, &param)) {
		failed("connect");
		goto out;
	}
	event = next_event(l->events);
	connected = event && event->event == RDMA_CM_EVENT_ESTABLISHED;
	printf("{\"connected\": %s, \"event\": \"%s\", \"answer\": ",
	       connected ? "true" : "false",
	       event ? rdma_event_str(event->event) : "timeout");
	hex(event ? event->param.conn.private_data : NULL,
	    event && event->param.conn.private_data ? event->param.conn.private_data_len : 0);
	puts("}");
	if (event)
		rdma_ack_cm_event(event);
out:
	freeaddrinfo(to);
}

static void do_listen(const char *address)
{
	struct addrinfo *at, hints = { .ai_socktype = SOCK_STREAM };

	if (getaddrinfo(address, "0", &hints, &at)) {
		failed(address);
		return;
	}
	listening = rdma_create_event_channel();
	if (!listening || rdma_create_id(listening, &listener, NULL, RDMA_PS_TCP) ||
	    rdma_bind_addr(listener, at->ai_addr) || rdma_listen(listener, 8))
		failed("listen");
	else
		printf("{\"port\": %u}\n", ntohs(rdma_get_src_port(listener)));
	freeaddrinfo(at);
}

/* The next request to connect; others' ends are passed over. */
static void do_await(void)
{
	struct rdma_cm_event *event;

	while ((event = next_event(listening))) {
		if (event->event == RDMA_CM_EVENT_CONNECT_REQUEST)
			break;
		rdma_ack_cm_event(event);
	}
	if (!event) {
		puts("{\"error\": \"nobody connects\"}");
		return;
	}
	waiting = event->id;
	printf("{\"hello\": ");
	hex(event->param.conn.private_data, event->param.conn.private_data_len);
	puts("}");
	rdma_ack_cm_event(event);
}

static void do_accept(struct link *l, const char *data, size_t bytes)
{
	struct rdma_conn_param param = param_of(data, bytes);

	drop(l);
	l->id = waiting;
	waiting = NULL;
	l->events = rdma_create_event_channel();
	if (!l->events || rdma_migrate_id(l->id, l->events)) {
		failed("rdma_cm");
		exit(1);
	}
	if (!make_qp(l))
		return;
	if (step(l, rdma_accept(l->id, &param), RDMA_CM_EVENT_ESTABLISHED))
		puts("{\"accepted\": true}");
}

static void do_reject(const char *data, size_t bytes)
{
	rdma_reject(waiting, data, bytes);
	rdma_destroy_id(waiting);
	waiting = NULL;
	puts("{\"rejected\": true}");
}

/* Posts, waits, and prints the status without the closing bracket. */
static bool post(struct link *l, enum ibv_wr_opcode opcode, size_t bytes,
		 uint32_t rkey, uint64_t address)
{
	struct ibv_sge sge = {
		.addr = (uintptr_t)sending(l),
		.length = bytes,
		.lkey = l->mr->lkey,
	};
	struct ibv_send_wr *bad, wr = {
		.sg_list = &sge,
		.num_sge = bytes ? 1 : 0,
		.opcode = opcode,
		.send_flags = IBV_SEND_SIGNALED,
	};
	long end = now_ms() + patience_ms;
	struct ibv_wc wc;
	int n = 0;

	if (opcode == IBV_WR_SEND_WITH_INV) {
		wr.invalidate_rkey = rkey;
	} else {
		wr.wr.rdma.remote_addr = address;
		wr.wr.rdma.rkey = rkey;
	}
	errno = ibv_post_send(l->id->qp, &wr, &bad);
	if (errno) {
		printf("{\"status\": \"%s\"", strerror(errno));
		return false;
	}
	while (!n && now_ms() < end) {
		n = ibv_poll_cq(l->send_cq, 1, &wc);
		if (!n)
			poll(NULL, 0, 1);
	}
	printf("{\"status\": \"%s\"", n > 0 ? ibv_wc_status_str(wc.status) : "timeout");
	return n > 0 && !wc.status;
}

static void do_recv(struct link *l, long ms)
{
	long end = now_ms() + ms;
	struct ibv_wc wc;
	int n;

	do {
		n = ibv_poll_cq(l->recv_cq, 1, &wc);
		if (n || now_ms() >= end)
			break;
		poll(NULL, 0, 1);
	} while (true);
	if (!n) {
		puts("{\"message\": null}");
	} else if (n < 0 || wc.status) {
		puts("{\"gone\": true}");
	} else {
		printf("{\"message\": ");
		hex(l->memory + wc.wr_id * ROOM, wc.byte_len);
		puts("}");
		post_recv(l, wc.wr_id);
	}
}

static void obey(char *line)
{
	char *word[8] = { NULL }, *save = NULL;
	static char data[ROOM];
	unsigned int n = 0;
	struct link *l;
	size_t bytes;

	for (line = strtok_r(line, " \n", &save); line && n < 8;
	     line = strtok_r(NULL, " \n", &save))
		word[n++] = line;
	if (n == 1 && !strcmp(word[0], "await")) {
		do_await();
		return;
	}
	if (n < 2) {
		puts("{\"error\": \"no command\"}");
		return;
	}
	/* The last word is data where there are any. */
	bytes = unhex(word[n - 1], data);
	if (!strcmp(word[0], "listen")) {
		do_listen(word[1]);
		return;
	}
	if (!waiting && (!strcmp(word[0], "reject") || !strcmp(word[0], "accept"))) {
		puts("{\"error\": \"nobody waits\"}");
		return;
	}
	if (!strcmp(word[0], "reject")) {
		do_reject(data, bytes);
		return;
	}
	l = &links[atoi(word[1]) & 1];
	if (!strcmp(word[0], "connect") && n == 5) {
		do_connect(l, word[2], word[3], data, bytes);
		return;
	}
	if (!strcmp(word[0], "accept") && n == 3) {
		do_accept(l, data, bytes);
		return;
	}
	if (!l->id || !l->id->qp) {
		puts("{\"error\": \"no connection\"}");
		return;
	}
	if (!strcmp(word[0], "close")) {
		drop(l);
		puts("{\"closed\": true}");
	} else if (!strcmp(word[0], "recv") && n == 3) {
		do_recv(l, atol(word[2]));
	} else if (!strcmp(word[0], "send") && n == 3) {
		memcpy(sending(l), data, bytes);
		post(l, IBV_WR_SEND, bytes, 0, 0);
		puts("}");
	} else if (!strcmp(word[0], "invalidate") && n == 4) {
		memcpy(sending(l), data, bytes);
		post(l, IBV_WR_SEND_WITH_INV, bytes, strtoul(word[2], NULL, 0), 0);
		puts("}");
	} else if (!strcmp(word[0], "write") && n == 5) {
		memcpy(sending(l), data, bytes);
		post(l, IBV_WR_RDMA_WRITE, bytes, strtoul(word[2], NULL, 0),
		     strtoull(word[3], NULL, 0));
		puts("}");
	} else if (!strcmp(word[0], "read") && n == 5) {
		bytes = strtoul(word[4], NULL, 0);
		bytes = bytes < ROOM ? bytes : ROOM;
		if (post(l, IBV_WR_RDMA_READ, bytes, strtoul(word[2], NULL, 0),
			 strtoull(word[3], NULL, 0))) {
			printf(", \"data\": ");
			hex(sending(l), bytes);
		}
		puts("}");
	} else {
		puts("{\"error\": \"no such command\"}");
	}
}

int main(int argc, char **argv)
{
	static char line[2 * ROOM + 256];

	if (argc > 1)
		patience_ms = atoi(argv[1]);
	puts("{\"started\": true}");
	fflush(stdout);
	while (fgets(line, sizeof(line), stdin)) {
		obey(line);
		fflush(stdout);
	}
	drop(&links[0]);
	drop(&links[1]);
	return 0;
}

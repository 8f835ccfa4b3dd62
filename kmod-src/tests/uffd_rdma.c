// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * What remote_ram is measured against: missing pages served in user space, by
 * userfaultfd and RDMA READ. As fast as that can be made: one loop reads
 * faults and completions, has many READs under way, spins before it sleeps.
 *
 *   uffd_rdma --serve ADDRESS         hold memory until killed
 *   uffd_rdma ADDRESS                 fetch it, print JSON
 *
 *   --port 7471
 *   --mib 64           size of the memory, the same on both sides
 *   --threads 1,4,16   one run for each number of faulting threads (1)
 *   --count 256        pages touched in each run, at random
 *   --how continue     READ into the page itself, which is pinned with all of
 *                      the memory beforehand, then map it (UFFDIO_CONTINUE);
 *                      or "copy": READ into a buffer, then UFFDIO_COPY.
 *                      UFFDIO_MOVE refuses pages that are pinned, so it can't
 *                      take what a NIC has written.
 *   --handlers 1       threads that serve faults, each with a queue pair
 *   --spin-us 0        how long they look before they sleep
 *   --seed 1
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <linux/userfaultfd.h>
#include <netdb.h>
#include <poll.h>
#include <pthread.h>
#include <rdma/rdma_cma.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "load.h"

#define SLOTS 64		/* READs of one handler under way */
#define HANDLERS 8
#define MAGIC 0x72726431
#define PATIENCE_MS 5000

/* Private data of the server's answer. Both hosts are of one kind. */
struct answer {
	uint32_t magic;
	uint32_t rkey;
	uint64_t addr;
	uint64_t bytes;
};

static const char *port = "7471", *how = "continue";
static unsigned long mib = 64, count = 256, spin_ns;
static unsigned int nr_handlers = 1;
static uint64_t seed = 1;

/* One queue pair, and the thread that serves faults by it. */
struct handler {
	struct rdma_cm_id *id;
	struct ibv_comp_channel *channel;
	struct ibv_cq *cq;
	char *buffer;		/* a page for each slot; how == copy */
	struct ibv_mr *buffer_mr;
	struct {
		char *page;	/* whose page the slot fetches */
	} slot[SLOTS];
	unsigned int free[SLOTS];
	unsigned int nr_free;
	pthread_t thread;
};

static struct handler handler[HANDLERS];
static struct answer remote;
static struct ibv_pd *pd;

/* The memory whose faults are served. */
static char *ram;		/* where it is touched */
static char *back;		/* the same pages, without userfaultfd */
static struct ibv_mr *back_mr;
static int uffd = -1, ending = -1;
static bool copies;

/* -- connecting ----------------------------------------------------------- */

static struct addrinfo *resolve(const char *address)
{
	struct addrinfo *found, hints = { .ai_socktype = SOCK_STREAM };
	int err = getaddrinfo(address, port, &hints, &found);

	if (err) {
		fprintf(stderr, "%s: %s\n", address, gai_strerror(err));
		exit(1);
	}
	return found;
}

static void expect(struct rdma_event_channel *events,
		   enum rdma_cm_event_type type, struct answer *answer)
{
	struct rdma_cm_event *event;

	if (rdma_get_cm_event(events, &event))
		die("connection event", errno);
	if (event->event != type) {
		fprintf(stderr, "%s instead of %s (status %d)\n",
			rdma_event_str(event->event), rdma_event_str(type),
			event->status);
		exit(1);
	}
	if (answer && event->param.conn.private_data_len >= sizeof(*answer))
		memcpy(answer, event->param.conn.private_data, sizeof(*answer));
	rdma_ack_cm_event(event);
}

static void make_qp(struct rdma_cm_id *id, struct ibv_cq *cq)
{
	struct ibv_qp_init_attr attr = {
		.send_cq = cq,
		.recv_cq = cq,
		.cap = {
			.max_send_wr = SLOTS,
			.max_recv_wr = 1,
			.max_send_sge = 1,
			.max_recv_sge = 1,
		},
		.qp_type = IBV_QPT_RC,
		.sq_sig_all = 1,
	};

	if (rdma_create_qp(id, pd, &attr))
		die("queue pair", errno);
}

/* How many READs may be under way at once: what the device can, or 128. */
static struct rdma_conn_param conn_param(struct rdma_cm_id *id)
{
	struct rdma_conn_param param = { .retry_count = 7 };
	struct ibv_device_attr attr;

	if (ibv_query_device(id->verbs, &attr))
		die("device", errno);
	param.responder_resources = attr.max_qp_rd_atom > 128 ? 128 : attr.max_qp_rd_atom;
	param.initiator_depth = attr.max_qp_init_rd_atom > 128 ? 128 : attr.max_qp_init_rd_atom;
	return param;
}

static void connect_to(struct handler *h, const char *address)
{
	struct rdma_event_channel *events = rdma_create_event_channel();
	struct addrinfo *to = resolve(address);
	struct rdma_conn_param param;
	unsigned int i;

	if (!events || rdma_create_id(events, &h->id, NULL, RDMA_PS_TCP))
		die("rdma_cm", errno);
	if (rdma_resolve_addr(h->id, NULL, to->ai_addr, PATIENCE_MS))
		die(address, errno);
	expect(events, RDMA_CM_EVENT_ADDR_RESOLVED, NULL);
	if (rdma_resolve_route(h->id, PATIENCE_MS))
		die(address, errno);
	expect(events, RDMA_CM_EVENT_ROUTE_RESOLVED, NULL);
	freeaddrinfo(to);

	if (!pd)
		pd = ibv_alloc_pd(h->id->verbs);
	h->channel = ibv_create_comp_channel(h->id->verbs);
	if (!pd || !h->channel)
		die("verbs", errno);
	h->cq = ibv_create_cq(h->id->verbs, 2 * SLOTS, NULL, h->channel, 0);
	if (!h->cq || fcntl(h->channel->fd, F_SETFL, O_NONBLOCK))
		die("completion queue", errno);
	make_qp(h->id, h->cq);
	h->buffer = aligned_alloc(PAGE, SLOTS * PAGE);
	if (!h->buffer)
		die("buffer", errno);
	h->buffer_mr = ibv_reg_mr(pd, h->buffer, SLOTS * PAGE, IBV_ACCESS_LOCAL_WRITE);
	if (!h->buffer_mr)
		die("registration of the buffer", errno);
	for (i = 0; i < SLOTS; i++)
		h->free[h->nr_free++] = i;

	param = conn_param(h->id);
	if (rdma_connect(h->id, &param))
		die(address, errno);
	expect(events, RDMA_CM_EVENT_ESTABLISHED, &remote);
	if (remote.magic != MAGIC || remote.bytes != mib << 20) {
		fprintf(stderr, "%s has no %lu MiB to serve\n", address, mib);
		exit(1);
	}
}

/* -- the server ----------------------------------------------------------- */

static int serve(const char *address)
{
	struct rdma_event_channel *events = rdma_create_event_channel();
	struct addrinfo *at = resolve(address);
	struct answer answer = { .magic = MAGIC, .bytes = mib << 20 };
	struct rdma_cm_id *listener;
	struct rdma_conn_param param;
	struct rdma_cm_event *event;
	struct ibv_mr *mr = NULL;
	char *memory;

	memory = mmap(NULL, mib << 20, PROT_READ | PROT_WRITE,
		      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (memory == MAP_FAILED)
		die("memory", errno);
	load_fill(memory, 0, (mib << 20) / PAGE, seed);
	if (!events || rdma_create_id(events, &listener, NULL, RDMA_PS_TCP) ||
	    rdma_bind_addr(listener, at->ai_addr) || rdma_listen(listener, 16))
		die(address, errno);
	printf("{\"listening\": %u}\n", ntohs(rdma_get_src_port(listener)));
	fflush(stdout);

	while (!rdma_get_cm_event(events, &event)) {
		struct rdma_cm_id *id = event->id;
		enum rdma_cm_event_type type = event->event;
		struct ibv_cq *cq;

		rdma_ack_cm_event(event);
		if (type == RDMA_CM_EVENT_CONNECT_REQUEST) {
			if (!pd)
				pd = ibv_alloc_pd(id->verbs);
			if (pd && !mr)
				mr = ibv_reg_mr(pd, memory, mib << 20,
						IBV_ACCESS_LOCAL_WRITE |
						IBV_ACCESS_REMOTE_READ);
			if (!pd || !mr)
				die("registration", errno);
			cq = ibv_create_cq(id->verbs, SLOTS, NULL, NULL, 0);
			if (!cq)
				die("completion queue", errno);
			make_qp(id, cq);
			answer.rkey = mr->rkey;
			answer.addr = (uintptr_t)memory;
			param = conn_param(id);
			param.private_data = &answer;
			param.private_data_len = sizeof(answer);
			if (rdma_accept(id, &param))
				die("accept", errno);
		} else if (type == RDMA_CM_EVENT_DISCONNECTED) {
			cq = id->qp->send_cq;
			rdma_disconnect(id);
			rdma_destroy_qp(id);
			ibv_destroy_cq(cq);
			rdma_destroy_id(id);
		}
	}
	die("connection event", errno);
}

/* -- serving faults ------------------------------------------------------- */

static void post_read(struct handler *h, unsigned int slot, void *to,
		      uint32_t lkey, unsigned long offset)
{
	struct ibv_sge sge = { .addr = (uintptr_t)to, .length = PAGE, .lkey = lkey };
	struct ibv_send_wr *bad, wr = {
		.wr_id = slot,
		.sg_list = &sge,
		.num_sge = 1,
		.opcode = IBV_WR_RDMA_READ,
		.wr.rdma = { .remote_addr = remote.addr + offset, .rkey = remote.rkey },
	};
	int err = ibv_post_send(h->id->qp, &wr, &bad);

	if (err)
		die("READ", err);
}

static void fetch(struct handler *h, char *page)
{
	unsigned int slot = h->free[--h->nr_free];
	unsigned long offset = page - ram;

	h->slot[slot].page = page;
	if (copies)
		post_read(h, slot, h->buffer + slot * PAGE, h->buffer_mr->lkey, offset);
	else
		post_read(h, slot, back + offset, back_mr->lkey, offset);
}

static void arrived(struct handler *h, const struct ibv_wc *wc)
{
	char *page = h->slot[wc->wr_id].page;
	int err;

	if (wc->status) {
		fprintf(stderr, "READ: %s\n", ibv_wc_status_str(wc->status));
		exit(1);
	}
	if (copies)
		err = ioctl(uffd, UFFDIO_COPY, &(struct uffdio_copy){
			.dst = (uintptr_t)page,
			.src = (uintptr_t)h->buffer + wc->wr_id * PAGE,
			.len = PAGE,
		});
	else
		err = ioctl(uffd, UFFDIO_CONTINUE, &(struct uffdio_continue){
			.range = { .start = (uintptr_t)page, .len = PAGE },
		});
	if (err && errno != EEXIST)
		die(copies ? "UFFDIO_COPY" : "UFFDIO_CONTINUE", errno);
	h->free[h->nr_free++] = wc->wr_id;
}

/* Sleeps until there is a fault, a completion or the end. */
static void doze(struct handler *h)
{
	struct pollfd fds[3] = {
		{ .fd = ending, .events = POLLIN },
		{ .fd = h->channel->fd, .events = POLLIN },
		{ .fd = h->nr_free ? uffd : -1, .events = POLLIN },
	};
	struct ibv_cq *cq;
	void *context;

	if (poll(fds, 3, -1) < 0 && errno != EINTR)
		die("poll", errno);
	if (fds[1].revents && !ibv_get_cq_event(h->channel, &cq, &context))
		ibv_ack_cq_events(cq, 1);
}

static bool turn(struct handler *h)
{
	struct uffd_msg msg[SLOTS];
	struct ibv_wc wc[SLOTS];
	ssize_t got = 0;
	int i, n;

	if (h->nr_free)
		got = read(uffd, msg, h->nr_free * sizeof(*msg));
	for (i = 0; i < got / (ssize_t)sizeof(*msg); i++)
		fetch(h, (char *)(uintptr_t)(msg[i].arg.pagefault.address & -PAGE));
	n = ibv_poll_cq(h->cq, SLOTS, wc);
	if (n < 0)
		die("completion queue", -n);
	for (i = 0; i < n; i++)
		arrived(h, &wc[i]);
	return got > 0 || n > 0;
}

static void *handle(void *arg)
{
	struct pollfd end = { .fd = ending, .events = POLLIN };
	struct handler *h = arg;
	uint64_t idle = load_now();

	for (;;) {
		if (turn(h)) {
			idle = load_now();
			continue;
		}
		if (load_now() - idle < spin_ns)
			continue;
		if (poll(&end, 1, 0) > 0)
			return NULL;
		/* What comes after the look and before the request is seen by another look. */
		if (ibv_req_notify_cq(h->cq, 0))
			die("notification", errno);
		if (!turn(h))
			doze(h);
		idle = load_now();
	}
}

static void watch(void)
{
	struct uffdio_api api = { .api = UFFD_API };
	struct uffdio_register range = {
		.range = { .start = (uintptr_t)ram, .len = mib << 20 },
		.mode = copies ? UFFDIO_REGISTER_MODE_MISSING :
				 UFFDIO_REGISTER_MODE_MINOR,
	};

	if (!copies)
		api.features = UFFD_FEATURE_MINOR_SHMEM;
	uffd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	if (uffd < 0 || ioctl(uffd, UFFDIO_API, &api) ||
	    ioctl(uffd, UFFDIO_REGISTER, &range))
		die("userfaultfd", errno);
}

/* New memory, of which no page is here. */
static void begin(void)
{
	int fd = -1, flags = MAP_PRIVATE | MAP_ANONYMOUS;

	if (!copies) {
		fd = memfd_create("uffd_rdma", MFD_CLOEXEC);
		if (fd < 0 || ftruncate(fd, mib << 20))
			die("memfd", errno);
		back = mmap(NULL, mib << 20, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
		if (back == MAP_FAILED)
			die("memory", errno);
		back_mr = ibv_reg_mr(pd, back, mib << 20, IBV_ACCESS_LOCAL_WRITE);
		if (!back_mr)
			die("registration of all memory", errno);
		flags = MAP_SHARED;
	}
	ram = mmap(NULL, mib << 20, PROT_READ | PROT_WRITE, flags, fd, 0);
	if (ram == MAP_FAILED)
		die("memory", errno);
	if (fd >= 0)
		close(fd);
	if (madvise(ram, mib << 20, MADV_NOHUGEPAGE) && errno != EINVAL)
		die("MADV_NOHUGEPAGE", errno);
	watch();
}

static void end(void)
{
	close(uffd);
	munmap(ram, mib << 20);
	if (!copies) {
		ibv_dereg_mr(back_mr);
		munmap(back, mib << 20);
	}
}

static unsigned long measure(unsigned int threads)
{
	unsigned long *page = load_pages(0, (mib << 20) / PAGE, true, seed + threads);
	unsigned long bad;
	unsigned int i;
	int err;

	begin();
	ending = eventfd(0, EFD_CLOEXEC);
	if (ending < 0)
		die("eventfd", errno);
	for (i = 0; i < nr_handlers; i++) {
		err = pthread_create(&handler[i].thread, NULL, handle, &handler[i]);
		if (err)
			die("thread", err);
	}
	bad = load_run(&(struct load){
		.base = ram, .page = page, .nr = count, .threads = threads, .seed = seed,
	});
	if (write(ending, &(uint64_t){ 1 }, 8) != 8)
		die("eventfd", errno);
	for (i = 0; i < nr_handlers; i++)
		pthread_join(handler[i].thread, NULL);
	close(ending);
	end();
	free(page);
	return bad;
}

/* One READ after another, by the same means but without a fault. */
static void measure_read(struct handler *h)
{
	uint64_t *ns = calloc(count, sizeof(*ns)), before;
	struct pollfd fd = { .fd = h->channel->fd, .events = POLLIN };
	unsigned long i, pages = (mib << 20) / PAGE;
	unsigned long *page = load_pages(0, pages, true, seed);
	struct ibv_cq *cq;
	struct ibv_wc wc;
	void *context;
	int n;

	if (!ns)
		die("times", ENOMEM);
	for (i = 0; i < count; i++) {
		before = load_now();
		post_read(h, 0, h->buffer, h->buffer_mr->lkey, page[i] * PAGE);
		while (!(n = ibv_poll_cq(h->cq, 1, &wc))) {
			if (load_now() - before < spin_ns)
				continue;
			if (ibv_req_notify_cq(h->cq, 0))
				die("notification", errno);
			n = ibv_poll_cq(h->cq, 1, &wc);
			if (n)
				break;
			if (poll(&fd, 1, -1) > 0 &&
			    !ibv_get_cq_event(h->channel, &cq, &context))
				ibv_ack_cq_events(cq, 1);
		}
		ns[i] = load_now() - before;
		if (n < 0)
			die("completion queue", -n);
		if (wc.status) {
			fprintf(stderr, "READ: %s\n", ibv_wc_status_str(wc.status));
			exit(1);
		}
		if (*(uint64_t *)h->buffer != load_word(page[i], seed, 0))
			die("a READ returned something else", EIO);
	}
	load_print_times(ns, count);
	free(ns);
	free(page);
}

int main(int argc, char **argv)
{
	static const struct option options[] = {
		{ "serve", no_argument, NULL, 'l' },
		{ "port", required_argument, NULL, 'p' },
		{ "mib", required_argument, NULL, 'm' },
		{ "threads", required_argument, NULL, 't' },
		{ "count", required_argument, NULL, 'c' },
		{ "how", required_argument, NULL, 'w' },
		{ "handlers", required_argument, NULL, 'h' },
		{ "spin-us", required_argument, NULL, 'u' },
		{ "seed", required_argument, NULL, 's' },
		{ }
	};
	unsigned int threads[16] = { 1 }, runs = 1, i;
	unsigned long bad = 0;
	bool server = false;
	int c;

	while ((c = getopt_long(argc, argv, "", options, NULL)) != -1) {
		if (c == 'l')
			server = true;
		else if (c == 'p')
			port = optarg;
		else if (c == 'm')
			mib = strtoul(optarg, NULL, 10);
		else if (c == 't')
			runs = load_list(optarg, threads, 16);
		else if (c == 'c')
			count = strtoul(optarg, NULL, 10);
		else if (c == 'w')
			how = optarg;
		else if (c == 'h')
			nr_handlers = strtoul(optarg, NULL, 10);
		else if (c == 'u')
			spin_ns = strtoul(optarg, NULL, 10) * 1000;
		else if (c == 's')
			seed = strtoul(optarg, NULL, 10);
		else
			return 2;
	}
	if (optind != argc - 1) {
		fprintf(stderr, "usage: %s [--serve] [options] ADDRESS\n", argv[0]);
		return 2;
	}
	copies = !strcmp(how, "copy");
	if (!copies && strcmp(how, "continue"))
		die(how, EINVAL);
	if (!mib || !count || count > (mib << 20) / PAGE)
		die("size or count", EINVAL);
	if (!nr_handlers || nr_handlers > HANDLERS)
		die("number of handlers", EINVAL);
	if (server)
		return serve(argv[optind]);

	for (i = 0; i < nr_handlers; i++)
		connect_to(&handler[i], argv[optind]);
	printf("{\"device\": \"%s\", \"how\": \"%s\", \"handlers\": %u, \"spin_us\": %lu, \"read_us\": ",
	       ibv_get_device_name(pd->context->device), how, nr_handlers, spin_ns / 1000);
	measure_read(&handler[0]);
	printf(", \"runs\": [");
	for (i = 0; i < runs; i++) {
		printf("%s", i ? ", " : "");
		bad += measure(threads[i]);
	}
	printf("]}\n");
	for (i = 0; i < nr_handlers; i++)
		rdma_disconnect(handler[i].id);
	return bad ? 1 : 0;
}

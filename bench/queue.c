/* The least that a program on NFQUEUE can do in C: accept every packet. `queue NUMBER`, until a signal ends it. */
#include <arpa/inet.h>
#include <linux/netfilter.h>
#include <libnetfilter_queue/libnetfilter_queue.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>

static int accept_packet(struct nfq_q_handle *queue, struct nfgenmsg *message, struct nfq_data *data, void *unused)
{
	struct nfqnl_msg_packet_hdr *header = nfq_get_msg_packet_hdr(data);

	(void)message;
	(void)unused;
	return nfq_set_verdict(queue, header ? ntohl(header->packet_id) : 0, NF_ACCEPT, 0, NULL);
}

int main(int argc, char **argv)
{
	static char buffer[65536];
	struct nfq_handle *library = nfq_open();
	struct nfq_q_handle *queue;
	int size = 8 << 20;
	ssize_t length;

	if (argc != 2 || !library)
		return 2;
	queue = nfq_create_queue(library, atoi(argv[1]), accept_packet, NULL);
	if (!queue || nfq_set_mode(queue, NFQNL_COPY_PACKET, 4096) < 0 || nfq_set_queue_maxlen(queue, 4096) < 0)
		return 1;
	setsockopt(nfq_fd(library), SOL_SOCKET, SO_RCVBUFFORCE, &size, sizeof size);
	puts("ready");
	fflush(stdout);
	for (;;) { /* an overrun (ENOBUFS) is no reason to stop */
		length = recv(nfq_fd(library), buffer, sizeof buffer, 0);
		if (length > 0)
			nfq_handle_packet(library, buffer, (int)length);
	}
}

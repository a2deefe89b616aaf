// The kernel's interface of its NBD client: generic netlink, as in linux/nbd-netlink.h.

package main

import (
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

const (
	NBD_CMD_CONNECT     = 1
	NBD_CMD_RECONFIGURE = 3
	NBD_CMD_LINK_DEAD   = 4

	NBD_ATTR_INDEX             = 1
	NBD_ATTR_SIZE_BYTES        = 2
	NBD_ATTR_BLOCK_SIZE_BYTES  = 3
	NBD_ATTR_TIMEOUT           = 4
	NBD_ATTR_SERVER_FLAGS      = 5
	NBD_ATTR_SOCKETS           = 7
	NBD_ATTR_DEAD_CONN_TIMEOUT = 8

	NBD_SOCK_ITEM = 1
	NBD_SOCK_FD   = 1
)

// kernel is the NBD client in the kernel. requests go over one socket and news come over
// another, so that none is taken for an answer.
type kernel struct {
	requests, news int
	family         uint16
}

var host = binary.NativeEndian

// dialKernel finds the client.
func dialKernel() (*kernel, error) {
	k := &kernel{}
	for _, fd := range []*int{&k.requests, &k.news} {
		var err error
		if *fd, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_GENERIC); err != nil {
			return nil, err
		}
		if err := unix.Bind(*fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
			return nil, err
		}
	}
	answer, err := k.ask(unix.GENL_ID_CTRL, unix.CTRL_CMD_GETFAMILY, attr(unix.CTRL_ATTR_FAMILY_NAME, []byte("nbd\x00")))
	if err != nil {
		return nil, fmt.Errorf("find nbd: %w", err)
	}
	found := attrs(answer)
	k.family = host.Uint16(found[unix.CTRL_ATTR_FAMILY_ID])
	for _, group := range attrs(found[unix.CTRL_ATTR_MCAST_GROUPS]) { // there is one
		id := host.Uint32(attrs(group)[unix.CTRL_ATTR_MCAST_GRP_ID])
		return k, unix.SetsockoptInt(k.news, unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, int(id))
	}
	return nil, errors.New("nbd does not tell of dead connections")
}

// connect makes c the connection of a disk that has none.
func (k *kernel) connect(index uint32, c connection) error {
	_, err := k.ask(k.family, NBD_CMD_CONNECT, attr32(NBD_ATTR_INDEX, index), attr64(NBD_ATTR_SIZE_BYTES, c.size),
		attr64(NBD_ATTR_BLOCK_SIZE_BYTES, 4096), attr64(NBD_ATTR_SERVER_FLAGS, uint64(c.flags)),
		attr64(NBD_ATTR_TIMEOUT, lostLimit), attr64(NBD_ATTR_DEAD_CONN_TIMEOUT, deadLimit), c.sockets())
	return err
}

// reconnect puts c in the place of the disk's dead connection.
func (k *kernel) reconnect(index uint32, c connection) error {
	_, err := k.ask(k.family, NBD_CMD_RECONFIGURE, attr32(NBD_ATTR_INDEX, index), c.sockets())
	return err
}

func (c connection) sockets() []byte {
	const nested = unix.NLA_F_NESTED
	return attr(NBD_ATTR_SOCKETS|nested, attr(NBD_SOCK_ITEM|nested, attr32(NBD_SOCK_FD, uint32(c.file.Fd()))))
}

// awaitDead waits until a connection is dead.
func (k *kernel) awaitDead() error {
	for {
		m, err := receive(k.news)
		if err != nil {
			return err
		}
		if m.kind == k.family && len(m.data) > 0 && m.data[0] == NBD_CMD_LINK_DEAD {
			return nil
		}
	}
}

// ask sends a command and returns the attributes of the answer, if there is one.
func (k *kernel) ask(family uint16, command byte, list ...[]byte) (answer []byte, err error) {
	body := []byte{command, 1, 0, 0} // struct genlmsghdr
	for _, a := range list {
		body = append(body, a...)
	}
	b := host.AppendUint32(nil, uint32(unix.NLMSG_HDRLEN+len(body)))
	b = host.AppendUint16(b, family)
	b = host.AppendUint16(b, unix.NLM_F_REQUEST|unix.NLM_F_ACK)
	b = append(b, make([]byte, 8)...) // numbers of the request and of us: of no use here
	if err := unix.Sendto(k.requests, append(b, body...), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return nil, err
	}
	for {
		m, err := receive(k.requests)
		switch {
		case err != nil:
			return nil, err
		case m.kind != unix.NLMSG_ERROR:
			answer = m.data[unix.GENL_HDRLEN:]
		case host.Uint32(m.data) != 0:
			return nil, unix.Errno(-int32(host.Uint32(m.data)))
		default:
			return answer, nil
		}
	}
}

// message is one of netlink's.
type message struct {
	kind uint16
	data []byte
}

// receive returns the next message, which comes alone.
func receive(fd int) (message, error) {
	b := make([]byte, 64<<10)
	n, _, err := unix.Recvfrom(fd, b, 0)
	if err != nil {
		return message{}, err
	}
	if n < unix.NLMSG_HDRLEN {
		return message{}, fmt.Errorf("a message of %d bytes", n)
	}
	return message{host.Uint16(b[4:]), b[unix.NLMSG_HDRLEN:n]}, nil
}

// attr is an attribute, filled up to four bytes.
func attr(kind uint16, value []byte) []byte {
	b := host.AppendUint16(nil, uint16(unix.NLA_HDRLEN+len(value)))
	b = append(host.AppendUint16(b, kind), value...)
	return append(b, make([]byte, -len(b)&3)...)
}

func attr32(kind uint16, v uint32) []byte { return attr(kind, host.AppendUint32(nil, v)) }
func attr64(kind uint16, v uint64) []byte { return attr(kind, host.AppendUint64(nil, v)) }

// attrs are the attributes in b, by kind.
func attrs(b []byte) map[uint16][]byte {
	found := make(map[uint16][]byte)
	for len(b) >= unix.NLA_HDRLEN {
		n := int(host.Uint16(b))
		if n < unix.NLA_HDRLEN || n > len(b) {
			break
		}
		found[host.Uint16(b[2:])&^unix.NLA_F_NESTED] = b[unix.NLA_HDRLEN:n]
		b = b[min(len(b), (n+3)&^3):]
	}
	return found
}

// A small NBD client: one request at a time, simple replies.

package test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"syscall"
	"testing"
	"time"
)

// Constants of the NBD protocol, by the names of the specification.
const (
	nbdMagic         = 0x4e42444d41474943
	nbdOptionMagic   = 0x49484156454f5054
	nbdOptReplyMagic = 0x0003e889045565a9
	nbdRequestMagic  = 0x25609513
	nbdReplyMagic    = 0x67446698

	NBD_FLAG_C_FIXED_NEWSTYLE = 1 << 0
	NBD_FLAG_C_NO_ZEROES      = 1 << 1

	NBD_OPT_GO = 7

	NBD_REP_ACK  = 1
	NBD_REP_INFO = 3

	NBD_INFO_EXPORT = 0

	NBD_CMD_READ         = 0
	NBD_CMD_WRITE        = 1
	NBD_CMD_DISC         = 2
	NBD_CMD_FLUSH        = 3
	NBD_CMD_TRIM         = 4
	NBD_CMD_WRITE_ZEROES = 6

	NBD_CMD_FLAG_FUA     = 1 << 0
	NBD_CMD_FLAG_NO_HOLE = 1 << 1
)

// nbdConn is one connection to an export, for one goroutine.
type nbdConn struct {
	net.Conn
	size   int64 // of the export, in bytes
	cookie uint64
}

// dial connects to a socket of the daemon. Reads and writes fail after
// patience.
func dial(t *testing.T, socket string) net.Conn {
	t.Helper()
	conn, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(patience))
	return conn
}

// open connects to an export of the daemon.
func (d *daemon) open(export string) *nbdConn {
	d.t.Helper()
	c := &nbdConn{Conn: dial(d.t, d.socket())}
	if err := c.handshake(export); err != nil {
		d.t.Fatalf("open export %q: %v", export, err)
	}
	return c
}

// destroy destroys a snapshot as soon as the daemon has noticed that its
// exports were closed; nothing tells a client when that is.
func destroy(t *testing.T, d *daemon, snapshot string) {
	t.Helper()
	eventually(t, "snapshot "+snapshot+" is destroyed", func() bool {
		err := syscall.Rmdir(d.snapshot(snapshot))
		if err != nil && !errors.Is(err, syscall.EBUSY) {
			t.Fatalf("destroy snapshot %s: %v", snapshot, err)
		}
		return err == nil
	})
}

func (c *nbdConn) handshake(export string) error {
	if err := c.greet(); err != nil {
		return err
	}
	if _, err := c.Write(encodeGo(export)); err != nil {
		return err
	}
	for {
		kind, data, err := c.optionReply()
		switch {
		case err != nil:
			return err
		case kind == NBD_REP_ACK:
			return nil
		case kind == NBD_REP_INFO && binary.BigEndian.Uint16(data) == NBD_INFO_EXPORT:
			c.size = int64(binary.BigEndian.Uint64(data[2:]))
		case kind != NBD_REP_INFO:
			return fmt.Errorf("option reply %#x: %s", kind, data)
		}
	}
}

// greet reads the server's greeting and answers it.
func (c *nbdConn) greet() error {
	var greeting [18]byte
	if _, err := io.ReadFull(c, greeting[:]); err != nil {
		return err
	}
	if binary.BigEndian.Uint64(greeting[:]) != nbdMagic || binary.BigEndian.Uint64(greeting[8:]) != nbdOptionMagic {
		return fmt.Errorf("greeting is %x", greeting)
	}
	flags := binary.BigEndian.AppendUint32(nil, NBD_FLAG_C_FIXED_NEWSTYLE|NBD_FLAG_C_NO_ZEROES)
	_, err := c.Write(flags)
	return err
}

// encodeOption returns an option as it is sent.
func encodeOption(number uint32, data []byte) []byte {
	p := binary.BigEndian.AppendUint64(nil, nbdOptionMagic)
	p = binary.BigEndian.AppendUint32(p, number)
	p = binary.BigEndian.AppendUint32(p, uint32(len(data)))
	return append(p, data...)
}

// encodeGo returns the option that chooses an export and begins the
// transmission phase.
func encodeGo(export string) []byte {
	data := binary.BigEndian.AppendUint32(nil, uint32(len(export)))
	data = append(data, export...)
	data = binary.BigEndian.AppendUint16(data, 0) // no information requests
	return encodeOption(NBD_OPT_GO, data)
}

// encodeRequest returns a request as it is sent.
func encodeRequest(command, flags uint16, cookie uint64, off int64, n uint32, payload []byte) []byte {
	p := binary.BigEndian.AppendUint32(nil, nbdRequestMagic)
	p = binary.BigEndian.AppendUint16(p, flags)
	p = binary.BigEndian.AppendUint16(p, command)
	p = binary.BigEndian.AppendUint64(p, cookie)
	p = binary.BigEndian.AppendUint64(p, uint64(off))
	p = binary.BigEndian.AppendUint32(p, n)
	return append(p, payload...)
}

func (c *nbdConn) optionReply() (kind uint32, data []byte, err error) {
	var head [20]byte
	if _, err := io.ReadFull(c, head[:]); err != nil {
		return 0, nil, err
	}
	if binary.BigEndian.Uint64(head[:]) != nbdOptReplyMagic {
		return 0, nil, fmt.Errorf("option reply begins with %x", head)
	}
	data = make([]byte, binary.BigEndian.Uint32(head[16:]))
	_, err = io.ReadFull(c, data)
	return binary.BigEndian.Uint32(head[12:]), data, err
}

// request sends a request without waiting for its reply.
func (c *nbdConn) request(command, flags uint16, off int64, n uint32, payload []byte) error {
	c.cookie++
	_, err := c.Write(encodeRequest(command, flags, c.cookie, off, n, payload))
	return err
}

// reply reads the reply to the newest request, and its data into p unless the
// server answers with an error. That error is a syscall.Errno.
func (c *nbdConn) reply(p []byte) error {
	var head [16]byte
	if _, err := io.ReadFull(c, head[:]); err != nil {
		return fmt.Errorf("read reply: %w", err)
	}
	if binary.BigEndian.Uint32(head[:]) != nbdReplyMagic || binary.BigEndian.Uint64(head[8:]) != c.cookie {
		return fmt.Errorf("reply to request %d is %x", c.cookie, head)
	}
	if e := binary.BigEndian.Uint32(head[4:]); e != 0 {
		return syscall.Errno(e)
	}
	_, err := io.ReadFull(c, p)
	return err
}

// anyReply reads the reply to any request that has no data in its reply, and
// returns the request's cookie.
func (c *nbdConn) anyReply() (cookie uint64, err error) {
	var head [16]byte
	if _, err := io.ReadFull(c, head[:]); err != nil {
		return 0, fmt.Errorf("read reply: %w", err)
	}
	cookie = binary.BigEndian.Uint64(head[8:])
	if binary.BigEndian.Uint32(head[:]) != nbdReplyMagic {
		return 0, fmt.Errorf("reply is %x", head)
	}
	if e := binary.BigEndian.Uint32(head[4:]); e != 0 {
		return cookie, fmt.Errorf("request %d: %w", cookie, syscall.Errno(e))
	}
	return cookie, nil
}

// do sends a request and waits for its reply.
func (c *nbdConn) do(command, flags uint16, off int64, n uint32, payload, into []byte) error {
	if err := c.request(command, flags, off, n, payload); err != nil {
		return err
	}
	return c.reply(into)
}

func (c *nbdConn) readAt(p []byte, off int64) error {
	return c.do(NBD_CMD_READ, 0, off, uint32(len(p)), nil, p)
}

func (c *nbdConn) writeAt(p []byte, off int64) error {
	return c.do(NBD_CMD_WRITE, 0, off, uint32(len(p)), p, nil)
}

func (c *nbdConn) zero(off, n int64) error {
	return c.do(NBD_CMD_WRITE_ZEROES, 0, off, uint32(n), nil, nil)
}

func (c *nbdConn) trim(off, n int64) error {
	return c.do(NBD_CMD_TRIM, 0, off, uint32(n), nil, nil)
}

func (c *nbdConn) flush() error {
	return c.do(NBD_CMD_FLUSH, 0, 0, 0, nil, nil)
}

// randomRange returns a range of whole sectors, at most most bytes long, that
// lies within size. Half of the ranges are of whole blocks of 4 KiB: the daemon
// has a shorter way for them.
func randomRange(rng *rand.Rand, size, most int64) (off, n int64) {
	unit := int64(SectorSize)
	if rng.IntN(2) == 0 {
		unit = 4 * kiB
	}
	n = (1 + rng.Int64N(most/unit)) * unit
	off = rng.Int64N((size-n)/unit+1) * unit
	return off, n
}

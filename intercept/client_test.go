// A client for the tests. It knows the three styles and checks whatever the
// specification lets a client check of a server.

package intercept

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"testing"
	"time"
)

// client is a connection to a server under test.
type client struct {
	t     testing.TB
	conn  net.Conn
	in    *bufio.Reader
	style style
	size  uint64 // of the export
	flags uint16 // transmission flags

	mu      sync.Mutex
	pending map[uint64]*exchange
	cookie  uint64
	err     error // why the connection ended
	ended   chan struct{}
}

// exchange is a request and the reply to it, as far as it has come.
type exchange struct {
	q       request
	done    chan struct{}
	err     error // what was wrong with the reply, or with the connection
	errno   uint32
	text    string
	errOff  int64 // of an NBD_REPLY_TYPE_ERROR_OFFSET, -1 without
	data    []byte
	covered int64 // bytes of data that came
	chunks  []uint16
	extents map[uint32][]Extent
}

// dial connects to a server and exchanges flags.
func dial(t testing.TB, addr net.Addr) *client {
	t.Helper()
	c := dialRaw(t, addr)
	c.greet(NBD_FLAG_C_FIXED_NEWSTYLE | NBD_FLAG_C_NO_ZEROES)
	return c
}

// dialRaw connects and does nothing more.
func dialRaw(t testing.TB, addr net.Addr) *client {
	t.Helper()
	conn, err := net.Dial(addr.Network(), addr.String())
	if err != nil {
		t.Fatalf("dial: %v", err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(60 * time.Second)) // no test hangs for ever
	return &client{t: t, conn: conn, in: bufio.NewReader(conn), pending: map[uint64]*exchange{}, ended: make(chan struct{})}
}

func (c *client) greet(flags uint32) {
	c.t.Helper()
	var hello [18]byte
	c.read(hello[:])
	if got := binary.BigEndian.Uint64(hello[:]); got != NBDMAGIC {
		c.t.Fatalf("first magic\n got %#x\nwant %#x", got, NBDMAGIC)
	}
	if got := binary.BigEndian.Uint64(hello[8:]); got != IHAVEOPT {
		c.t.Fatalf("second magic\n got %#x\nwant %#x", got, IHAVEOPT)
	}
	if got, want := binary.BigEndian.Uint16(hello[16:]), NBD_FLAG_FIXED_NEWSTYLE|NBD_FLAG_NO_ZEROES; got != want {
		c.t.Fatalf("handshake flags\n got %#x\nwant %#x", got, want)
	}
	c.write(binary.BigEndian.AppendUint32(nil, flags))
}

func (c *client) read(p []byte) {
	c.t.Helper()
	if _, err := io.ReadFull(c.in, p); err != nil {
		c.t.Fatalf("read %d bytes: %v", len(p), err)
	}
}

func (c *client) write(p []byte) {
	c.t.Helper()
	if _, err := c.conn.Write(p); err != nil {
		c.t.Fatalf("write %d bytes: %v", len(p), err)
	}
}

// wantEnd fails unless the server closes the connection without another byte.
func (c *client) wantEnd() {
	c.t.Helper()
	if b, err := c.in.ReadByte(); err == nil {
		c.t.Fatalf("the server sent %#x instead of closing the connection", b)
	} else if t := net.Error(nil); errors.As(err, &t) && t.Timeout() {
		c.t.Fatal("the server did not close the connection")
	}
}

// optionReply is one reply to an option.
type optionReply struct {
	typ  uint32
	data []byte
}

// sendOption sends an option whose header announces n bytes. Where the server
// closes the connection meanwhile, the next read notices.
func (c *client) sendOption(id uint32, n int, data []byte) {
	c.t.Helper()
	p := binary.BigEndian.AppendUint64(nil, IHAVEOPT)
	p = binary.BigEndian.AppendUint32(p, id)
	p = binary.BigEndian.AppendUint32(p, uint32(n))
	c.conn.Write(append(p, data...))
}

// option sends an option and returns all replies; the last one is the final.
func (c *client) option(id uint32, data []byte) []optionReply {
	c.t.Helper()
	c.sendOption(id, len(data), data)
	return c.optionReplies(id)
}

func (c *client) optionReplies(id uint32) []optionReply {
	c.t.Helper()
	var list []optionReply
	for {
		var head [20]byte
		c.read(head[:])
		if got := binary.BigEndian.Uint64(head[:]); got != NBD_REP_MAGIC {
			c.t.Fatalf("magic of option reply\n got %#x\nwant %#x", got, NBD_REP_MAGIC)
		}
		if got := binary.BigEndian.Uint32(head[8:]); got != id {
			c.t.Fatalf("reply to option\n got %d\nwant %d", got, id)
		}
		r := optionReply{binary.BigEndian.Uint32(head[12:]), make([]byte, binary.BigEndian.Uint32(head[16:]))}
		c.read(r.data)
		list = append(list, r)
		if r.typ == NBD_REP_ACK || r.typ>>31 == 1 {
			return list
		}
	}
}

// final is option for those of which only the last reply matters.
func (c *client) final(id uint32, data []byte) uint32 {
	c.t.Helper()
	r := c.option(id, data)
	return r[len(r)-1].typ
}

// infoData is the data of INFO and GO.
func infoData(name string, infos ...uint16) []byte {
	p := appendString(nil, name)
	p = binary.BigEndian.AppendUint16(p, uint16(len(infos)))
	for _, i := range infos {
		p = binary.BigEndian.AppendUint16(p, i)
	}
	return p
}

// metaData is the data of LIST_ and SET_META_CONTEXT.
func metaData(name string, queries ...string) []byte {
	p := appendString(nil, name)
	p = binary.BigEndian.AppendUint32(p, uint32(len(queries)))
	for _, q := range queries {
		p = appendString(p, q)
	}
	return p
}

func appendString(p []byte, s string) []byte {
	return append(binary.BigEndian.AppendUint32(p, uint32(len(s))), s...)
}

// connect negotiates style and contexts and goes to export name.
func connect(t testing.TB, addr net.Addr, st style, name string, contexts ...string) *client {
	t.Helper()
	c := dial(t, addr)
	c.begin(st, name, contexts...)
	return c
}

// begin is connect after the flags were exchanged.
func (c *client) begin(st style, name string, contexts ...string) {
	c.t.Helper()
	switch st {
	case structured:
		c.wantFinal(NBD_OPT_STRUCTURED_REPLY, nil, NBD_REP_ACK)
	case extended:
		c.wantFinal(NBD_OPT_EXTENDED_HEADERS, nil, NBD_REP_ACK)
	}
	if len(contexts) > 0 {
		c.wantFinal(NBD_OPT_SET_META_CONTEXT, metaData(name, contexts...), NBD_REP_ACK)
	}
	c.style = st
	for _, r := range c.option(NBD_OPT_GO, infoData(name)) {
		switch {
		case r.typ == NBD_REP_INFO && len(r.data) == 12:
			c.size = binary.BigEndian.Uint64(r.data[2:])
			c.flags = binary.BigEndian.Uint16(r.data[10:])
		case r.typ != NBD_REP_ACK:
			c.t.Fatalf("reply to GO %q: %#x %q", name, r.typ, r.data)
		}
	}
	go c.receive()
}

func (c *client) wantFinal(id uint32, data []byte, want uint32) {
	c.t.Helper()
	if got := c.final(id, data); got != want {
		c.t.Fatalf("final reply to option %d\n got %#x\nwant %#x", id, got, want)
	}
}

// appendRequest is the wire form of q.
func (c *client) appendRequest(p []byte, q request) []byte {
	if c.style == extended {
		p = binary.BigEndian.AppendUint32(p, NBD_EXTENDED_REQUEST_MAGIC)
	} else {
		p = binary.BigEndian.AppendUint32(p, NBD_REQUEST_MAGIC)
	}
	p = binary.BigEndian.AppendUint16(p, q.flags)
	p = binary.BigEndian.AppendUint16(p, q.typ)
	p = binary.BigEndian.AppendUint64(p, q.cookie)
	p = binary.BigEndian.AppendUint64(p, q.off)
	if c.style == extended {
		return binary.BigEndian.AppendUint64(p, q.n)
	}
	return binary.BigEndian.AppendUint32(p, uint32(q.n))
}

// start sends a request; its cookie is made here, and the payload flag of
// extended headers is added to writes. It may be called from one goroutine.
func (c *client) start(q request, payload []byte) *exchange {
	c.mu.Lock()
	c.cookie++
	q.cookie = c.cookie<<32 | 0xabcd
	if c.style == extended && q.typ == NBD_CMD_WRITE {
		q.flags |= NBD_CMD_FLAG_PAYLOAD_LEN
	}
	x := &exchange{q: q, done: make(chan struct{}), errOff: -1, extents: map[uint32][]Extent{}}
	if c.err != nil {
		x.err = c.err
		close(x.done)
		c.mu.Unlock()
		return x
	}
	c.pending[q.cookie] = x
	c.mu.Unlock()
	c.conn.Write(append(c.appendRequest(nil, q), payload...)) // receive notices what is wrong
	return x
}

// do sends a request and waits for the reply.
func (c *client) do(q request, payload []byte) *exchange {
	x := c.start(q, payload)
	<-x.done
	return x
}

// want is do for a request whose error is known.
func (c *client) want(q request, payload []byte, errno uint32) *exchange {
	c.t.Helper()
	x := c.do(q, payload)
	if x.err != nil {
		c.t.Fatalf("request %+v: %v", q, x.err)
	}
	if x.errno != errno {
		c.t.Fatalf("error of request type %d flags %#x off %d n %d\n got %d %q\nwant %d", q.typ, q.flags, q.off, q.n, x.errno, x.text, errno)
	}
	return x
}

// disconnect ends the session as a good client does and waits for the server.
func (c *client) disconnect() {
	c.t.Helper()
	c.conn.Write(c.appendRequest(nil, request{typ: NBD_CMD_DISC}))
	<-c.ended
	if !errors.Is(c.err, io.EOF) {
		c.t.Errorf("after DISC\n got %v\nwant EOF", c.err)
	}
}

// receive reads replies until the connection ends.
func (c *client) receive() {
	var err error
	for err == nil {
		err = c.message()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.err = err
	for _, x := range c.pending {
		x.err = fmt.Errorf("connection ended: %w", err)
		close(x.done)
	}
	close(c.ended)
}

// message reads one reply, or one chunk.
func (c *client) message() error {
	var head [extendedReplySize]byte
	if _, err := io.ReadFull(c.in, head[:4]); err != nil {
		return err
	}
	magic := binary.BigEndian.Uint32(head[:])
	size := map[uint32]int{NBD_SIMPLE_REPLY_MAGIC: simpleReplySize, NBD_STRUCTURED_REPLY_MAGIC: structuredReplySize, NBD_EXTENDED_REPLY_MAGIC: extendedReplySize}[magic]
	if size == 0 || (size == structuredReplySize) != (c.style == structured) && size != simpleReplySize || (size == extendedReplySize) != (c.style == extended) {
		return fmt.Errorf("magic %#x in a reply in style %v", magic, c.style)
	}
	if _, err := io.ReadFull(c.in, head[4:size]); err != nil {
		return err
	}
	c.mu.Lock()
	x := c.pending[binary.BigEndian.Uint64(head[8:])]
	c.mu.Unlock()
	if x == nil {
		return fmt.Errorf("reply with an unknown cookie: % x", head[:size])
	}
	last, err := true, error(nil)
	if size == simpleReplySize {
		err = c.simple(x, binary.BigEndian.Uint32(head[4:]))
	} else {
		n := uint64(binary.BigEndian.Uint32(head[16:]))
		if c.style == extended {
			if off := binary.BigEndian.Uint64(head[16:]); off != x.q.off {
				return fmt.Errorf("offset in an extended header: got %d, want %d", off, x.q.off)
			}
			n = binary.BigEndian.Uint64(head[24:])
		}
		last = binary.BigEndian.Uint16(head[4:])&NBD_REPLY_FLAG_DONE != 0
		err = c.chunk(x, binary.BigEndian.Uint16(head[6:]), n, last)
	}
	if err != nil {
		return err
	}
	if last {
		if x.q.typ == NBD_CMD_READ && x.errno == 0 && uint64(x.covered) != x.q.n {
			return fmt.Errorf("reply to a read of %d bytes has %d", x.q.n, x.covered)
		}
		c.mu.Lock()
		delete(c.pending, x.q.cookie)
		c.mu.Unlock()
		close(x.done)
	}
	return nil
}

// simple reads the data of a simple reply.
func (c *client) simple(x *exchange, errno uint32) error {
	x.errno = errno
	if x.q.typ != NBD_CMD_READ {
		return nil
	}
	if c.style != simple {
		return errors.New("simple reply to a read, with structured replies")
	}
	if errno != 0 {
		return nil
	}
	x.data, x.covered = make([]byte, x.q.n), int64(x.q.n)
	_, err := io.ReadFull(c.in, x.data)
	return err
}

// chunk reads the payload of a chunk.
func (c *client) chunk(x *exchange, typ uint16, n uint64, last bool) error {
	if n > maxPayload+8 {
		return fmt.Errorf("chunk of type %#x with %d bytes", typ, n)
	}
	p := make([]byte, n)
	if _, err := io.ReadFull(c.in, p); err != nil {
		return err
	}
	x.chunks = append(x.chunks, typ)
	switch {
	case typ == NBD_REPLY_TYPE_NONE:
		if n != 0 || !last {
			return fmt.Errorf("NBD_REPLY_TYPE_NONE with %d bytes, last %t", n, last)
		}
		return nil
	case typ == NBD_REPLY_TYPE_OFFSET_DATA && n >= 9 && x.q.typ == NBD_CMD_READ:
		return x.content(binary.BigEndian.Uint64(p), p[8:])
	case typ == NBD_REPLY_TYPE_OFFSET_HOLE && n == 12 && x.q.typ == NBD_CMD_READ:
		return x.content(binary.BigEndian.Uint64(p), make([]byte, binary.BigEndian.Uint32(p[8:])))
	case typ == NBD_REPLY_TYPE_BLOCK_STATUS && c.style == structured && n >= 12 && n%8 == 4:
		return x.status(binary.BigEndian.Uint32(p), p[4:], 4)
	case typ == NBD_REPLY_TYPE_BLOCK_STATUS_EXT && c.style == extended && n >= 24 && n%16 == 8:
		if count := uint64(binary.BigEndian.Uint32(p[4:])); count*16+8 != n {
			return fmt.Errorf("block status of %d bytes says that it has %d descriptors", n, count)
		}
		return x.status(binary.BigEndian.Uint32(p), p[8:], 8)
	case typ>>15 == 1 && n >= 6:
		return x.fail(typ, p)
	}
	return fmt.Errorf("chunk of type %#x with %d bytes in reply to type %d in style %v", typ, n, x.q.typ, c.style)
}

// content takes data or a hole at off.
func (x *exchange) content(off uint64, p []byte) error {
	if off < x.q.off || off+uint64(len(p)) > x.q.off+x.q.n || len(p) == 0 {
		return fmt.Errorf("content of %d bytes at %d in reply to a read of %d at %d", len(p), off, x.q.n, x.q.off)
	}
	if x.q.flags&NBD_CMD_FLAG_DF != 0 && x.covered > 0 {
		return errors.New("second content chunk in spite of NBD_CMD_FLAG_DF")
	}
	if x.data == nil {
		x.data = make([]byte, x.q.n)
	}
	copy(x.data[off-x.q.off:], p)
	x.covered += int64(len(p)) // an overlap makes it too large in the end
	return nil
}

// status takes the descriptors of a context, of two numbers of size bytes.
func (x *exchange) status(id uint32, p []byte, size int) error {
	if x.extents[id] != nil {
		return fmt.Errorf("second block status of context %d", id)
	}
	sum := uint64(0)
	for ; len(p) > 0; p = p[2*size:] {
		if sum >= x.q.n {
			return errors.New("descriptor after the end of what was asked for")
		}
		n, flags := uint64(binary.BigEndian.Uint32(p)), uint64(binary.BigEndian.Uint32(p[size:]))
		if size == 8 {
			n, flags = binary.BigEndian.Uint64(p), binary.BigEndian.Uint64(p[size:])
		}
		if n == 0 {
			return errors.New("descriptor of no bytes")
		}
		sum += n
		x.extents[id] = append(x.extents[id], Extent{int64(n), uint32(flags)})
	}
	if x.q.flags&NBD_CMD_FLAG_REQ_ONE != 0 && (len(x.extents[id]) != 1 || sum > x.q.n) {
		return fmt.Errorf("descriptors in spite of NBD_CMD_FLAG_REQ_ONE: %v", x.extents[id])
	}
	return nil
}

// fail takes an error chunk.
func (x *exchange) fail(typ uint16, p []byte) error {
	x.errno = binary.BigEndian.Uint32(p)
	n := int(binary.BigEndian.Uint16(p[4:]))
	rest := map[uint16]int{NBD_REPLY_TYPE_ERROR: 0, NBD_REPLY_TYPE_ERROR_OFFSET: 8}[typ]
	if len(p) != 6+n+rest || n > maxString || x.errno == 0 {
		return fmt.Errorf("bad error chunk of type %#x: % x", typ, p)
	}
	x.text = string(p[6 : 6+n])
	if rest > 0 {
		off := binary.BigEndian.Uint64(p[6+n:])
		if off < x.q.off || off >= x.q.off+x.q.n {
			return fmt.Errorf("error at %d in reply to a request for %d at %d", off, x.q.n, x.q.off)
		}
		x.errOff = int64(off)
	}
	return nil
}

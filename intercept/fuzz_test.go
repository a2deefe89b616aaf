package intercept

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"sync"
	"testing"
	"time"
)

// tape is a connection whose client has said all that it will say.
type tape struct {
	in *bytes.Reader

	mu  sync.Mutex
	out bytes.Buffer
}

func (c *tape) Read(p []byte) (int, error) { return c.in.Read(p) }

func (c *tape) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.out.Write(p)
}

func (c *tape) Close() error                     { return nil }
func (c *tape) LocalAddr() net.Addr              { return &net.UnixAddr{Name: "tape"} }
func (c *tape) RemoteAddr() net.Addr             { return &net.UnixAddr{Name: "tape"} }
func (c *tape) SetDeadline(time.Time) error      { return nil }
func (c *tape) SetReadDeadline(time.Time) error  { return nil }
func (c *tape) SetWriteDeadline(time.Time) error { return nil }

// strict is a device that fails the test for a range that it must not be given.
type strict struct {
	*tryMemory
	t *testing.T
}

func newStrict(t *testing.T) *strict {
	d := &strict{&tryMemory{memory: newMemory(1 << 20)}, t}
	d.before = func(op string, off, n int64) error {
		if op != "flush" && (off < 0 || n <= 0 || off > d.Size()-n) {
			t.Errorf("%s of %d bytes at %d in a device of %d", op, n, off, d.Size())
			return errors.New("out of range") // and not a panic that hides it
		}
		return nil
	}
	return d
}

// mendOptions makes most of data options that get past the first checks: a
// header whose first byte is not 0xff gets the right magic, and a length whose
// first byte is not 0xff becomes a short one.
func mendOptions(data []byte) []byte {
	data = bytes.Clone(data)
	for p := data; len(p) >= 4+16; {
		p = p[4:]
		if p[0] != 0xff {
			binary.BigEndian.PutUint64(p, IHAVEOPT)
		}
		if p[12] != 0xff {
			clear(p[12:15])
		}
		n := int(binary.BigEndian.Uint32(p[12:]))
		p = p[min(len(p), 16+n-4):] // the next round skips the four bytes of flags
	}
	return data
}

// mendRequests is mendOptions for requests: their offsets and lengths, too,
// become what a device of 1 MiB may be asked for.
func mendRequests(data []byte, st style) []byte {
	data = bytes.Clone(data)
	for p := data; len(p) >= st.requestSize(); {
		if p[0] != 0xff {
			binary.BigEndian.PutUint32(p, map[bool]uint32{false: NBD_REQUEST_MAGIC, true: NBD_EXTENDED_REQUEST_MAGIC}[st == extended])
		}
		for _, field := range [][]byte{p[16:24], p[24:st.requestSize()]} {
			if field[0] != 0xff {
				clear(field[:len(field)-3])
				field[len(field)-3] &= 0x1f
			}
		}
		q, _ := parseRequest(p, st)
		p = p[st.requestSize():]
		p = p[min(uint64(len(p)), q.payload(st)):]
	}
	return data
}

// FuzzHandshake lets a client say anything in the first phase. Whatever it is,
// every export that was opened is released, but for the one that was chosen.
func FuzzHandshake(f *testing.F) {
	for _, st := range styles {
		p := script(&client{}, st)
		f.Add(p)
		f.Add(bytes.Replace(p, []byte{0, 0, 0, byte(NBD_OPT_GO)}, []byte{0, 0, 0, byte(NBD_OPT_EXPORT_NAME)}, 1))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		data = mendOptions(data)
		exports := newShelf(map[string]Device{"disk": newStrict(t), "other": newMemory(5000)})
		conn := &tape{in: bytes.NewReader(data)}
		s := NewServer(Options{Exports: exports})
		h := &handshake{server: s, connection: &connection{server: s}, conn: conn, out: bufio.NewWriter(conn)}
		err := h.run(context.Background())
		if err == nil {
			h.export.Release()
		}
		for name, n := range exports.open {
			if n != 0 {
				t.Errorf("export %s is open %d times after %v", name, n, err)
			}
		}
		if len(h.contexts) > maxContexts {
			t.Errorf("%d contexts", len(h.contexts))
		}
	})
}

// FuzzTransmission lets a client send anything in the second phase. The device
// sees no range that is not its own, every request that came whole is answered,
// once, by the rules that the tests' client knows, and nothing else is said.
func FuzzTransmission(f *testing.F) {
	for _, st := range styles {
		c := &client{}
		p := script(c, st)
		f.Add(byte(st), p[bytes.LastIndex(p, []byte("disk\x00\x00"))+6:])
		many := c.appendRequest(nil, request{typ: NBD_CMD_READ, n: 1 << 20, cookie: 1})
		many = c.appendRequest(many, request{typ: NBD_CMD_READ, flags: NBD_CMD_FLAG_DF, off: 100, n: 200 << 10, cookie: 2})
		many = c.appendRequest(many, request{typ: NBD_CMD_TRIM, flags: NBD_CMD_FLAG_FUA, off: 1 << 19, n: 1 << 19, cookie: 3})
		many = c.appendRequest(many, request{typ: NBD_CMD_WRITE_ZEROES, flags: NBD_CMD_FLAG_FAST_ZERO, n: 1, cookie: 4})
		many = c.appendRequest(many, request{typ: NBD_CMD_CACHE, off: 1 << 20, cookie: 5})
		f.Add(byte(st), many)
		f.Add(byte(st), c.appendRequest(nil, request{typ: NBD_CMD_WRITE, off: 1 << 63, n: 1 << 32}))
		f.Add(byte(st), append(c.appendRequest(nil, request{
			typ: NBD_CMD_BLOCK_STATUS, flags: NBD_CMD_FLAG_PAYLOAD_LEN, n: 12, cookie: 1,
		}), 0, 0, 0, 0, 0, 0, 16, 0, 0, 0, 0, 1))
	}
	f.Fuzz(func(t *testing.T, which byte, data []byte) {
		st := styles[int(which)%len(styles)]
		data = mendRequests(data, st)
		dev, released := newStrict(t), 0
		export := &Export{ExportInfo{"disk", ""}, dev, func() { released++ }, nil}
		conn := &tape{in: bytes.NewReader(data)}
		s := NewServer(Options{Exports: newShelf(nil), MemoryBudget: 64 << 20})
		h := &handshake{server: s, connection: &connection{server: s}, conn: conn, style: st, export: export, metaFor: "disk"}
		if st != simple {
			h.contexts = []metaContext{"base:allocation", dirtyBitmap}
		}
		newSession(s, h, &lease{release: export.Release}, s.opts.Log).run()
		if released != 1 {
			t.Errorf("export released %d times", released)
		}
		if got, want := s.budget.free, newBudget(64<<20, 256).free; got != want {
			t.Errorf("free budget\n got %d\nwant %d", got, want)
		}
		checkReplies(t, st, data, &conn.out)
	})
}

// checkReplies reads the replies to the requests in data.
func checkReplies(t *testing.T, st style, data []byte, out io.Reader) {
	c := &client{t: t, in: bufio.NewReader(out), style: st, pending: map[uint64]*exchange{}, ended: make(chan struct{})}
	for len(data) >= st.requestSize() {
		q, ok := parseRequest(data, st)
		if !ok || q.typ == NBD_CMD_DISC {
			break
		}
		data = data[st.requestSize():]
		n := q.payload(st)
		if n > uint64(len(data)) {
			// It did not come whole: it may be answered or not.
			n = uint64(len(data))
		}
		if c.pending[q.cookie] != nil {
			return // two with the same cookie: replies cannot be told apart
		}
		x := &exchange{q: q, done: make(chan struct{}), errOff: -1, extents: map[uint32][]Extent{}}
		if q.typ == NBD_CMD_BLOCK_STATUS && q.flags&NBD_CMD_FLAG_PAYLOAD_LEN != 0 && n >= 8 {
			x.q.n = 1 << 62 // the length is in the payload
		}
		c.pending[q.cookie] = x
		data = data[n:]
		if q.payload(st) > n {
			x.q.typ = NBD_CMD_DISC // marks it as cut
		}
	}
	if err := c.receiveAll(); err != nil {
		t.Errorf("replies: %v", err)
	}
	for _, x := range c.pending {
		if x.q.typ != NBD_CMD_DISC {
			t.Errorf("no reply to %+v", x.q)
		}
	}
}

// receiveAll reads replies to the end of the input.
func (c *client) receiveAll() error {
	for {
		if err := c.message(); err == io.EOF {
			return nil
		} else if err != nil {
			return err
		}
	}
}

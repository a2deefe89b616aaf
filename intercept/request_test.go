package intercept

import (
	"bytes"
	"errors"
	"math"
	"sync"
	"syscall"
	"testing"
	"time"
)

// styles are tried by every test of the transmission phase.
var styles = []style{simple, structured, extended}

// TestCheck sends requests that the server refuses, or must not refuse, each
// followed by a read that shows that the connection is still in step.
func TestCheck(t *testing.T) {
	const size = 1 << 20
	image := newMemory(size)
	image.readOnly = true
	exports := newShelf(map[string]Device{"disk": newMemory(size), "image": image})
	_, addr := startServer(t, Options{Exports: exports})
	page := make([]byte, 4096)

	for _, tc := range []struct {
		name    string
		export  string
		q       request
		payload []byte
		want    [3]uint32 // simple, structured, extended
	}{
		{"unknown command", "disk", request{typ: 8}, nil, all(NBD_EINVAL)},
		{"highest command", "disk", request{typ: math.MaxUint16}, nil, all(NBD_EINVAL)},
		{"unknown flag", "disk", request{typ: NBD_CMD_READ, flags: 1 << 6, n: 512}, nil, all(NBD_EINVAL)},
		{"all flags", "disk", request{typ: NBD_CMD_WRITE, flags: 0xffff, n: 4096}, page, all(NBD_EINVAL)},
		{"flag of another command", "disk", request{typ: NBD_CMD_READ, flags: NBD_CMD_FLAG_NO_HOLE, n: 512}, nil, all(NBD_EINVAL)},
		{"write with a flag of another command", "disk", request{typ: NBD_CMD_WRITE, flags: NBD_CMD_FLAG_REQ_ONE, n: 4096}, page, all(NBD_EINVAL)},
		{"don't fragment", "disk", request{typ: NBD_CMD_READ, flags: NBD_CMD_FLAG_DF, n: 512}, nil, [3]uint32{NBD_EINVAL, 0, 0}},
		{"FUA on read", "disk", request{typ: NBD_CMD_READ, flags: NBD_CMD_FLAG_FUA, n: 512}, nil, all(0)},
		{"FUA on flush", "disk", request{typ: NBD_CMD_FLUSH, flags: NBD_CMD_FLAG_FUA}, nil, all(0)},
		{"flush with offset", "disk", request{typ: NBD_CMD_FLUSH, off: 512}, nil, all(NBD_EINVAL)},
		{"flush with length", "disk", request{typ: NBD_CMD_FLUSH, n: 512}, nil, all(NBD_EINVAL)},
		{"cache with unknown flag", "disk", request{typ: NBD_CMD_CACHE, flags: 1 << 7, n: 512}, nil, all(NBD_EINVAL)},

		{"read to the end", "disk", request{typ: NBD_CMD_READ, off: size - 512, n: 512}, nil, all(0)},
		{"read across the end", "disk", request{typ: NBD_CMD_READ, off: size - 511, n: 512}, nil, all(NBD_EINVAL)},
		{"read beyond the end", "disk", request{typ: NBD_CMD_READ, off: size, n: 1}, nil, all(NBD_EINVAL)},
		{"read at the last offset", "disk", request{typ: NBD_CMD_READ, off: math.MaxUint64, n: 1}, nil, all(NBD_EINVAL)},
		{"read over the overflow", "disk", request{typ: NBD_CMD_READ, off: math.MaxUint64 - 10, n: 512}, nil, all(NBD_EINVAL)},
		{"write across the end", "disk", request{typ: NBD_CMD_WRITE, off: size - 4095, n: 4096}, page, all(NBD_ENOSPC)},
		{"write over the overflow", "disk", request{typ: NBD_CMD_WRITE, off: math.MaxUint64 - 10, n: 4096}, page, all(NBD_ENOSPC)},
		{"trim across the end", "disk", request{typ: NBD_CMD_TRIM, off: size - 1, n: 2}, nil, all(NBD_EINVAL)},
		{"zeroes across the end", "disk", request{typ: NBD_CMD_WRITE_ZEROES, off: size - 1, n: 2}, nil, all(NBD_ENOSPC)},
		{"cache across the end", "disk", request{typ: NBD_CMD_CACHE, off: size - 1, n: 2}, nil, all(NBD_EINVAL)},
		{"trim of 4 GiB", "disk", request{typ: NBD_CMD_TRIM, n: math.MaxUint32}, nil, all(NBD_EINVAL)},

		{"read of nothing", "disk", request{typ: NBD_CMD_READ}, nil, all(0)},
		{"read of nothing at the end", "disk", request{typ: NBD_CMD_READ, off: size}, nil, all(0)},
		{"read of nothing beyond the end", "disk", request{typ: NBD_CMD_READ, off: size + 1}, nil, all(NBD_EINVAL)},
		{"write of nothing", "disk", request{typ: NBD_CMD_WRITE}, nil, all(0)},
		{"trim of nothing", "disk", request{typ: NBD_CMD_TRIM}, nil, all(0)},
		{"zeroes of nothing", "disk", request{typ: NBD_CMD_WRITE_ZEROES}, nil, all(0)},
		{"cache of nothing", "disk", request{typ: NBD_CMD_CACHE}, nil, all(0)},

		{"read longer than the maximum", "disk", request{typ: NBD_CMD_READ, n: maxPayload + 1}, nil, [3]uint32{NBD_EINVAL, NBD_EOVERFLOW, NBD_EOVERFLOW}},
		{"read of 4 GiB", "disk", request{typ: NBD_CMD_READ, n: math.MaxUint32}, nil, [3]uint32{NBD_EINVAL, NBD_EOVERFLOW, NBD_EOVERFLOW}},
		{"status without contexts", "disk", request{typ: NBD_CMD_BLOCK_STATUS, n: 4096}, nil, all(NBD_EINVAL)},

		{"write to an image", "image", request{typ: NBD_CMD_WRITE, n: 4096}, page, all(NBD_EPERM)},
		{"write beyond an image", "image", request{typ: NBD_CMD_WRITE, off: size, n: 4096}, page, all(NBD_EPERM)},
		{"trim of an image", "image", request{typ: NBD_CMD_TRIM, n: 4096}, nil, all(NBD_EPERM)},
		{"zeroes to an image", "image", request{typ: NBD_CMD_WRITE_ZEROES, n: 4096}, nil, all(NBD_EPERM)},
		{"flush of an image", "image", request{typ: NBD_CMD_FLUSH}, nil, all(0)},
		{"cache of an image", "image", request{typ: NBD_CMD_CACHE, n: 4096}, nil, all(0)},
	} {
		for _, st := range styles {
			t.Run(tc.name+"/"+st.String(), func(t *testing.T) {
				c := connect(t, addr, st, tc.export)
				x := c.want(tc.q, tc.payload, tc.want[st])
				if st != simple && x.errno != 0 && x.text == "" {
					t.Errorf("error %d came without a text", x.errno)
				}
				c.want(request{typ: NBD_CMD_READ, n: 512}, nil, 0)
				c.disconnect()
			})
		}
	}
}

func all(errno uint32) [3]uint32 { return [3]uint32{errno, errno, errno} }

// TestLongPayload sends writes that are too long: they are skipped as far as
// that is bearable, and otherwise end the connection.
func TestLongPayload(t *testing.T) {
	addr := serveDevice(t, newMemory(64<<20))
	for _, tc := range []struct {
		name  string
		style style
		n     uint64
		want  uint32 // 0: the connection ends
	}{
		{"simple, above the maximum", simple, maxPayload + 1, NBD_EINVAL},
		{"structured, twice the maximum", structured, maxDiscard, NBD_EINVAL},
		{"structured, more than that", structured, maxDiscard + 1, 0},
		{"structured, 4 GiB", structured, math.MaxUint32, 0},
		{"extended, above the maximum", extended, maxPayload + 1, 0},
		{"extended, 64 bits", extended, math.MaxUint64, 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := connect(t, addr, tc.style, "disk")
			if tc.want == 0 {
				x := c.do(request{typ: NBD_CMD_WRITE, n: tc.n}, nil)
				if x.err == nil {
					t.Fatalf("a write of %d bytes was answered with %d", tc.n, x.errno)
				}
				return
			}
			c.want(request{typ: NBD_CMD_WRITE, n: tc.n}, make([]byte, tc.n), tc.want)
			c.want(request{typ: NBD_CMD_READ, n: 512}, nil, 0)
		})
	}
}

// TestPayloadFlag checks extended headers' rule for payloads of any command.
func TestPayloadFlag(t *testing.T) {
	c := connect(t, serveDevice(t, newMemory(1<<20)), extended, "disk")
	c.want(request{typ: NBD_CMD_TRIM, flags: NBD_CMD_FLAG_PAYLOAD_LEN, n: 5}, []byte("hello"), NBD_EINVAL)
	c.want(request{typ: 99, flags: NBD_CMD_FLAG_PAYLOAD_LEN, n: 1 << 20}, make([]byte, 1<<20), NBD_EINVAL)
	c.want(request{typ: NBD_CMD_READ, flags: NBD_CMD_FLAG_PAYLOAD_LEN, n: 512}, make([]byte, 512), NBD_EINVAL)

	// A write without the flag has no payload. start would add the flag.
	x := &exchange{q: request{typ: NBD_CMD_WRITE, n: 4096, cookie: 7}, done: make(chan struct{})}
	c.mu.Lock()
	c.pending[7] = x
	c.mu.Unlock()
	c.write(c.appendRequest(nil, x.q))
	if <-x.done; x.errno != NBD_EINVAL || x.err != nil {
		t.Errorf("write without NBD_CMD_FLAG_PAYLOAD_LEN\n got %d, %v\nwant %d", x.errno, x.err, NBD_EINVAL)
	}
	c.want(request{typ: NBD_CMD_READ, n: 512}, nil, 0)
}

// TestLongEffect checks requests for more than 32 bits of length, which reach the
// device in steps, and end when nobody waits for them.
func TestLongEffect(t *testing.T) {
	const size = 1 << 40
	var mu sync.Mutex
	var fail error
	calls, bytes := 0, int64(0)
	big := &sized{newMemory(0), size, true}
	big.before = func(op string, _, n int64) error {
		mu.Lock()
		defer mu.Unlock()
		if op != "flush" {
			calls, bytes = calls+1, bytes+n
		}
		return fail
	}
	c := connect(t, serveDevice(t, big), extended, "disk")
	for _, tc := range []struct {
		typ, flags uint16
		err        error
		calls      int
		bytes      int64
	}{
		{typ: NBD_CMD_TRIM, flags: NBD_CMD_FLAG_FUA, calls: 1024, bytes: size - 4096},
		{typ: NBD_CMD_WRITE_ZEROES, calls: 1024, bytes: size - 4096},
		{typ: NBD_CMD_CACHE, calls: 1, bytes: maxCache},
		{typ: NBD_CMD_TRIM, err: syscall.EIO, calls: 1, bytes: maxStep},
		{typ: NBD_CMD_WRITE_ZEROES, err: syscall.EIO, calls: 1, bytes: maxStep},
	} {
		mu.Lock()
		fail, calls, bytes = tc.err, 0, 0
		mu.Unlock()
		flushes, errno := big.flushes.Load(), uint32(0)
		if tc.err != nil {
			errno = NBD_EIO
		}
		c.want(request{typ: tc.typ, flags: tc.flags, off: 4096, n: size - 4096}, nil, errno)
		if calls != tc.calls || bytes != tc.bytes {
			t.Errorf("request %+v in the device\n got %d calls, %d bytes\nwant %d calls, %d bytes", tc, calls, bytes, tc.calls, tc.bytes)
		}
		if got, want := big.flushes.Load()-flushes, int64(0); tc.flags != 0 && got == want {
			t.Errorf("request %+v is not durable", tc)
		}
		c.want(request{typ: tc.typ, off: 4096, n: 1 << 63}, nil, map[bool]uint32{false: NBD_EINVAL, true: NBD_ENOSPC}[tc.typ == NBD_CMD_WRITE_ZEROES])
	}
}

// TestLongEffectUnwanted ends a long request when its client is gone.
func TestLongEffectUnwanted(t *testing.T) {
	const steps = 1 << 12
	entered := make(chan struct{}, steps)
	big := &sized{newMemory(0), steps * maxStep, true}
	big.before = func(string, int64, int64) error {
		entered <- struct{}{}
		time.Sleep(time.Millisecond) // as long as it takes
		return nil
	}
	s, addr := startServer(t, Options{Exports: newShelf(map[string]Device{"disk": big})})
	c := connect(t, addr, extended, "disk")
	c.start(request{typ: NBD_CMD_TRIM, n: steps * maxStep}, nil)
	<-entered
	c.conn.Close()
	if err := s.Shutdown(soon(t)); err != nil {
		t.Error(err)
	}
	if n := len(entered) + 1; n == steps {
		t.Error("the device did all that the client had asked for")
	}
}

type sized struct {
	*memory
	size    int64
	lengths bool // Trim and WriteZeroes do nothing but count
}

func (s *sized) Trim(off, n int64, fua bool) error {
	if !s.lengths {
		return s.memory.Trim(off, n, fua)
	}
	return s.enter("trim", off, n)
}

func (s *sized) WriteZeroes(off, n int64, f ZeroFlags) error {
	if !s.lengths {
		return s.memory.WriteZeroes(off, n, f)
	}
	return s.enter("zero", off, n)
}

func (s *sized) Size() int64 { return s.size }

func TestBadRequestMagic(t *testing.T) {
	for _, st := range styles {
		t.Run(st.String(), func(t *testing.T) {
			c := connect(t, serveDevice(t, newMemory(1<<20)), st, "disk")
			c.write(bytes.Repeat([]byte{0x25}, st.requestSize()))
			<-c.ended
		})
	}
	t.Run("header of the other form", func(t *testing.T) {
		c := connect(t, serveDevice(t, newMemory(1<<20)), extended, "disk")
		c.style = structured
		c.write(append(c.appendRequest(nil, request{n: 512}), 0, 0, 0, 0))
		<-c.ended
	})
}

// TestErrors makes the device fail and expects the error, its text and, for
// reads, its offset.
func TestErrors(t *testing.T) {
	dev := newMemory(1 << 20)
	dev.before = func(op string, off, n int64) error {
		return &refusal{"no " + op + " today", syscall.EIO}
	}
	for _, d := range []Device{plain{dev}, &tryMemory{memory: dev}} {
		addr := serveDevice(t, d)
		for _, st := range styles {
			c := connect(t, addr, st, "disk")
			for _, tc := range []struct {
				op string
				q  request
			}{
				{"read", request{typ: NBD_CMD_READ, off: 8192, n: 4096}},
				{"read", request{typ: NBD_CMD_READ, off: 8192, n: 200 << 10}},
				{"write", request{typ: NBD_CMD_WRITE, off: 8192, n: 4096}},
				{"write", request{typ: NBD_CMD_WRITE, off: 8192, n: 200 << 10}},
				{"write", request{typ: NBD_CMD_WRITE, flags: NBD_CMD_FLAG_FUA, off: 8192, n: 4096}},
				{"zero", request{typ: NBD_CMD_WRITE_ZEROES, off: 8192, n: 4096}},
				{"trim", request{typ: NBD_CMD_TRIM, off: 8192, n: 4096}},
				{"cache", request{typ: NBD_CMD_CACHE, off: 8192, n: 4096}},
				{"flush", request{typ: NBD_CMD_FLUSH}},
			} {
				var payload []byte
				if tc.q.typ == NBD_CMD_WRITE {
					payload = make([]byte, tc.q.n)
				}
				for range 3 { // the way through tryMemory differs
					x := c.want(tc.q, payload, NBD_EIO)
					if want := "no " + tc.op + " today"; st != simple && x.text != want {
						t.Errorf("%s in style %v: text\n got %q\nwant %q", tc.op, st, x.text, want)
					}
					if want := int64(8192); st != simple && tc.op == "read" && x.errOff != want {
						t.Errorf("%s in style %v: offset of the error\n got %d\nwant %d", tc.op, st, x.errOff, want)
					}
				}
			}
			c.disconnect()
		}
	}
}

// TestErrorText checks that any error's text becomes a string that the
// specification allows.
func TestErrorText(t *testing.T) {
	text := "\x00caf\xe9 " + string(bytes.Repeat([]byte("é"), 500))
	dev := newMemory(4096)
	dev.before = func(string, int64, int64) error { return errors.New(text) }
	c := connect(t, serveDevice(t, dev), structured, "disk")
	got := c.want(request{typ: NBD_CMD_READ, n: 512}, nil, NBD_EIO).text
	if !validString(got) || len(got) > maxMessage || !bytes.HasPrefix([]byte(got), []byte("caf éé")) {
		t.Errorf("text\n got %q\nwant one that is valid and begins with %q", got, "caf éé")
	}
}

// TestFastZero checks the one error that belongs to one flag.
func TestFastZero(t *testing.T) {
	dev := newMemory(1 << 20)
	c := connect(t, serveDevice(t, dev), structured, "disk")
	c.want(request{typ: NBD_CMD_WRITE_ZEROES, flags: NBD_CMD_FLAG_FAST_ZERO, n: 4096}, nil, 0)
	c.want(request{typ: NBD_CMD_WRITE_ZEROES, flags: NBD_CMD_FLAG_FAST_ZERO | NBD_CMD_FLAG_NO_HOLE, n: 4096}, nil, NBD_ENOTSUP)
	c.want(request{typ: NBD_CMD_WRITE_ZEROES, flags: NBD_CMD_FLAG_NO_HOLE, n: 4096}, nil, 0)
	dev.before = func(string, int64, int64) error { return syscall.ENOTSUP }
	c.want(request{typ: NBD_CMD_WRITE_ZEROES, n: 4096}, nil, NBD_EINVAL)
}

// TestFlagsReachTheDevice counts what arrives.
func TestFlagsReachTheDevice(t *testing.T) {
	dev := newMemory(1 << 20)
	c := connect(t, serveDevice(t, &tryMemory{memory: dev}), structured, "disk")
	for range 3 {
		c.want(request{typ: NBD_CMD_WRITE, flags: NBD_CMD_FLAG_FUA, n: 4096}, make([]byte, 4096), 0)
		c.want(request{typ: NBD_CMD_WRITE_ZEROES, flags: NBD_CMD_FLAG_FUA, n: 4096}, nil, 0)
		c.want(request{typ: NBD_CMD_TRIM, flags: NBD_CMD_FLAG_FUA, n: 4096}, nil, 0)
		c.want(request{typ: NBD_CMD_WRITE, n: 4096}, make([]byte, 4096), 0)
		c.want(request{typ: NBD_CMD_FLUSH}, nil, 0)
		c.want(request{typ: NBD_CMD_CACHE, off: 100, n: 1000}, nil, 0)
	}
	if got := dev.fua.Load(); got != 9 {
		t.Errorf("durable writes\n got %d\nwant 9", got)
	}
	if got := dev.flushes.Load(); got != 3 {
		t.Errorf("flushes\n got %d\nwant 3", got)
	}
	if got := dev.cached.Load(); got != 3000 {
		t.Errorf("bytes cached\n got %d\nwant 3000", got)
	}
}

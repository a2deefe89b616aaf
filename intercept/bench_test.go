package intercept

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// fileDevice is a Device over a file, as fast as one can be: what is in the
// page cache is read at once, and what is written goes there.
type fileDevice struct {
	f    *os.File
	fd   int
	size int64
}

// newFileDevice makes a file of size bytes of data, in the page cache.
func newFileDevice(t testing.TB, size int64) *fileDevice {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "disk"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	block := make([]byte, 1<<20)
	for i := range block {
		block[i] = byte(i*7 + i>>8 + 1)
	}
	for off := int64(0); off < size; off += int64(len(block)) {
		if _, err := f.Write(block); err != nil {
			t.Fatal(err)
		}
	}
	return &fileDevice{f, int(f.Fd()), size}
}

func (d *fileDevice) Size() int64                                 { return d.size }
func (d *fileDevice) ReadOnly() bool                              { return false }
func (d *fileDevice) Read(p []byte, off int64) error              { return full(unix.Pread(d.fd, p, off)) }
func (d *fileDevice) Flush() error                                { return unix.Fdatasync(d.fd) }
func (d *fileDevice) Cache(off, n int64) error                    { return nil }
func (d *fileDevice) Trim(off, n int64, fua bool) error           { return nil }
func (d *fileDevice) WriteZeroes(off, n int64, f ZeroFlags) error { return nil }

func (d *fileDevice) Write(p []byte, off int64, fua bool) error {
	if err := full(unix.Pwrite(d.fd, p, off)); err != nil || !fua {
		return err
	}
	return d.Flush()
}

func (d *fileDevice) TryWrite(p []byte, off int64, _ func(func() error)) error {
	return full(unix.Pwrite(d.fd, p, off))
}

func (d *fileDevice) TryRead(p []byte, off int64) error {
	n, err := unix.Preadv2(d.fd, [][]byte{p}, off, unix.RWF_NOWAIT)
	if err == unix.EAGAIN || err == unix.EOPNOTSUPP || err == nil && n < len(p) {
		return ErrWouldBlock
	}
	return err
}

func full(_ int, err error) error { return err }

// pump is a client that keeps a number of equal requests in flight and
// allocates nothing while it does.
type pump struct {
	conn    net.Conn
	st      style
	q       request
	size    int64 // of the export
	depth   int
	request []byte // depth of them, with payloads
	reply   []byte // room for all their replies
	each    int    // bytes of a reply
}

func newPump(c *client, q request, depth int) *pump {
	p := &pump{conn: c.conn, st: c.style, q: q, size: int64(c.size), depth: depth}
	payload := make([]byte, 0)
	if q.typ == NBD_CMD_WRITE {
		payload = make([]byte, q.n)
	}
	for range depth {
		p.request = append(c.appendRequest(p.request, q), payload...)
	}
	p.each = simpleReplySize
	if q.typ == NBD_CMD_READ {
		p.each = int(p.st.headSize()) + int(q.n)
	}
	p.reply = make([]byte, depth*p.each)
	return p
}

// round sends the requests, at the next offsets, and takes the replies.
func (p *pump) round() error {
	one := len(p.request) / p.depth
	for i := range p.depth {
		binary.BigEndian.PutUint64(p.request[i*one+16:], p.q.off)
		if p.q.off += p.q.n * 7; p.q.off+p.q.n > uint64(p.size) {
			p.q.off = 0
		}
	}
	if _, err := p.conn.Write(p.request); err != nil {
		return err
	}
	_, err := io.ReadFull(p.conn, p.reply)
	return err
}

// silentDisk is a client of a server for dev, ready for a pump.
func silentDisk(t testing.TB, dev Device, st style) *client {
	t.Helper()
	c := dial(t, serveDevice(t, dev))
	c.conn.SetDeadline(time.Time{})
	if st == structured {
		c.wantFinal(NBD_OPT_STRUCTURED_REPLY, nil, NBD_REP_ACK)
	}
	c.wantFinal(NBD_OPT_GO, infoData("disk"), NBD_REP_ACK)
	c.style, c.size = st, uint64(dev.Size())
	return c
}

// BenchmarkLoop is the transmission loop over a file in the page cache and a
// unix socket, client included.
func BenchmarkLoop(b *testing.B) {
	for _, tc := range []struct {
		name  string
		q     request
		depth int
	}{
		{"read4K/1", request{typ: NBD_CMD_READ, n: 4096}, 1},
		{"read4K/32", request{typ: NBD_CMD_READ, n: 4096}, 32},
		{"write4K/1", request{typ: NBD_CMD_WRITE, n: 4096}, 1},
		{"write4K/32", request{typ: NBD_CMD_WRITE, n: 4096}, 32},
		{"read1M/1", request{typ: NBD_CMD_READ, n: 1 << 20}, 1},
		{"read1M/4", request{typ: NBD_CMD_READ, n: 1 << 20}, 4},
		{"write1M/4", request{typ: NBD_CMD_WRITE, n: 1 << 20}, 4},
	} {
		b.Run(tc.name, func(b *testing.B) {
			p := newPump(silentDisk(b, newFileDevice(b, 256<<20), structured), tc.q, tc.depth)
			b.SetBytes(int64(tc.q.n))
			b.ReportAllocs()
			for range 256 { // first use of memory and of the file's pages costs more
				if err := p.round(); err != nil {
					b.Fatal(err)
				}
			}
			b.ResetTimer()
			for n := 0; n < b.N; n += tc.depth {
				if err := p.round(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// TestNoAllocation counts what requests allocate when connections have run for
// a while: nothing, on every way through the server.
func TestNoAllocation(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector makes sync.Pool forget")
	}
	const rounds = 400
	dev := newMemory(8 << 20)
	for i := range dev.data {
		dev.data[i] = 1
	}
	for _, tc := range []struct {
		name string
		dev  Device
		q    request
	}{
		{"read at once", atOnce{dev}, request{typ: NBD_CMD_READ, n: 4096}},
		{"read by a worker", plain{dev}, request{typ: NBD_CMD_READ, n: 4096}},
		{"large read at once", atOnce{dev}, request{typ: NBD_CMD_READ, n: 1 << 20}},
		{"large read by a worker", plain{dev}, request{typ: NBD_CMD_READ, n: 1 << 20}},
		{"write at once", atOnce{dev}, request{typ: NBD_CMD_WRITE, n: 4096}},
		{"write by a worker", plain{dev}, request{typ: NBD_CMD_WRITE, n: 4096}},
		{"large write at once", atOnce{dev}, request{typ: NBD_CMD_WRITE, n: 1 << 20}},
		{"large write by a worker", plain{dev}, request{typ: NBD_CMD_WRITE, n: 1 << 20}},
		{"durable write", atOnce{dev}, request{typ: NBD_CMD_WRITE, flags: NBD_CMD_FLAG_FUA, n: 4096}},
		{"flush", atOnce{dev}, request{typ: NBD_CMD_FLUSH}},
		{"trim", atOnce{dev}, request{typ: NBD_CMD_TRIM, n: 4096}},
	} {
		for _, st := range []style{simple, structured} {
			for _, depth := range []int{1, 8} {
				t.Run(fmt.Sprintf("%s/%v/%d", tc.name, st, depth), func(t *testing.T) {
					p := newPump(silentDisk(t, tc.dev, st), tc.q, depth)
					run := func(n int) {
						for range n {
							if err := p.round(); err != nil {
								t.Fatal(err)
							}
						}
					}
					run(100)
					var got uint64
					for range 3 { // the garbage collector may empty the pools once
						var before, after runtime.MemStats
						runtime.ReadMemStats(&before)
						run(rounds / depth)
						runtime.ReadMemStats(&after)
						// A few are the runtime's own.
						if got = after.Mallocs - before.Mallocs; got <= rounds/10 {
							return
						}
					}
					t.Errorf("allocations of %d requests\n got %d\nwant (almost) none", rounds, got)
				})
			}
		}
	}
}

// atOnce is a memory that never would block.
type atOnce struct{ *memory }

func (a atOnce) TryRead(p []byte, off int64) error { return a.Read(p, off) }

func (a atOnce) TryWrite(p []byte, off int64, _ func(func() error)) error {
	return a.Write(p, off, false)
}

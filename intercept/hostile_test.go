package intercept

import (
	"bytes"
	"errors"
	"io"
	"net"
	"runtime"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// script is what a client sends in a connection that uses most of what there
// is, from the flags to DISC.
func script(c *client, st style) []byte {
	p := []byte{0, 0, 0, byte(NBD_FLAG_C_FIXED_NEWSTYLE | NBD_FLAG_C_NO_ZEROES)}
	option := func(id uint32, data []byte) {
		p = append(p, "IHAVEOPT"...)
		p = append(p, 0, 0, 0, byte(id), 0, 0, byte(len(data)>>8), byte(len(data)))
		p = append(p, data...)
	}
	option(NBD_OPT_LIST, nil)
	switch st {
	case structured:
		option(NBD_OPT_STRUCTURED_REPLY, nil)
	case extended:
		option(NBD_OPT_EXTENDED_HEADERS, nil)
	}
	option(NBD_OPT_SET_META_CONTEXT, metaData("disk", "base:allocation"))
	option(NBD_OPT_INFO, infoData("disk", NBD_INFO_BLOCK_SIZE))
	option(NBD_OPT_GO, infoData("disk"))

	c.style = st
	write := request{typ: NBD_CMD_WRITE, cookie: 1, n: 100}
	if st == extended {
		write.flags = NBD_CMD_FLAG_PAYLOAD_LEN
	}
	p = append(c.appendRequest(p, write), make([]byte, 100)...)
	p = c.appendRequest(p, request{typ: NBD_CMD_READ, cookie: 2, n: 4096})
	p = c.appendRequest(p, request{typ: NBD_CMD_BLOCK_STATUS, cookie: 3, n: 4096})
	p = c.appendRequest(p, request{typ: NBD_CMD_FLUSH, cookie: 4})
	return c.appendRequest(p, request{typ: NBD_CMD_DISC})
}

// TestDisconnectAtEveryByte sends the script up to each of its bytes and then
// goes away, or stops sending and reads what comes. That exports are released
// and memory is given back, startServer's cleanup checks.
func TestDisconnectAtEveryByte(t *testing.T) {
	exports := newShelf(map[string]Device{"disk": &tryMemory{memory: newMemory(1 << 20)}})
	_, addr := startServer(t, Options{Exports: exports})
	for _, st := range styles {
		for _, halfClose := range []bool{false, true} {
			full := script(&client{}, st)
			for n := range len(full) + 1 {
				conn, err := net.Dial(addr.Network(), addr.String())
				if err != nil {
					t.Fatal(err)
				}
				conn.Write(full[:n])
				if halfClose {
					conn.(*net.UnixConn).CloseWrite()
					conn.SetReadDeadline(time.Now().Add(20 * time.Second))
					// The server closes, which may reset what it has not read.
					if _, err := io.Copy(io.Discard, conn); isTimeout(err) {
						t.Errorf("style %v: the server did not end the connection after byte %d", st, n)
					}
				}
				conn.Close()
			}
		}
	}
	connect(t, addr, simple, "disk").disconnect()
}

func isTimeout(err error) bool {
	t := net.Error(nil)
	return errors.As(err, &t) && t.Timeout()
}

// TestByteByByte sends the script one byte at a time.
func TestByteByByte(t *testing.T) {
	addr := serveDevice(t, newMemory(1<<20))
	for _, st := range styles {
		conn, err := net.Dial(addr.Network(), addr.String())
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			for _, b := range script(&client{}, st) {
				conn.Write([]byte{b})
				runtime.Gosched()
			}
		}()
		conn.SetReadDeadline(time.Now().Add(20 * time.Second))
		got, err := io.ReadAll(conn)
		if err != nil || len(got) < 4096 {
			t.Errorf("style %v: %d bytes came, %v", st, len(got), err)
		}
		conn.Close()
	}
}

// TestManyConnections opens ten thousand connections, each dropped at some
// point of the script, several at a time.
func TestManyConnections(t *testing.T) {
	exports := newShelf(map[string]Device{"disk": newMemory(1 << 20)})
	s, addr := startServer(t, Options{Exports: exports})
	before := runtime.NumGoroutine()
	full := script(&client{}, structured)
	var next atomic.Int64
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for n := next.Add(1); n <= 10_000; n = next.Add(1) {
				conn, err := net.Dial(addr.Network(), addr.String())
				for errors.Is(err, syscall.EAGAIN) { // the listener's backlog is full
					runtime.Gosched()
					conn, err = net.Dial(addr.Network(), addr.String())
				}
				if err != nil {
					t.Errorf("connection %d: %v", n, err)
					return
				}
				conn.Write(full[:int(n)%len(full)])
				conn.Close()
			}
		})
	}
	wg.Wait()
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(time.Millisecond) {
		s.mu.Lock()
		open := len(s.conns)
		s.mu.Unlock()
		if n := runtime.NumGoroutine(); open == 0 && n <= before {
			break
		} else if time.Now().After(deadline) {
			t.Fatalf("afterwards\n got %d connections, %d goroutines\nwant 0, %d", open, n, before)
		}
	}
}

// TestSlowReader has clients that send requests until nothing more is taken and
// never read a reply. Others are served meanwhile, and memory stays bounded.
func TestSlowReader(t *testing.T) {
	dev := newMemory(8 << 20)
	for i := range dev.data {
		dev.data[i] = 1 // no holes
	}
	exports := newShelf(map[string]Device{"disk": &tryMemory{memory: dev}})
	_, addr := startServer(t, Options{Exports: exports})
	before := heap()

	requests := map[string][]byte{
		"large reads": (&client{}).appendRequest(nil, request{typ: NBD_CMD_READ, n: 1 << 20}),
		"small reads": (&client{}).appendRequest(nil, request{typ: NBD_CMD_READ, n: 4096}),
		"refused":     (&client{}).appendRequest(nil, request{typ: 99}),
		"flushes":     (&client{}).appendRequest(nil, request{typ: NBD_CMD_FLUSH}),
		"trims":       (&client{}).appendRequest(nil, request{typ: NBD_CMD_TRIM, n: 4096}),
		"fua writes":  append((&client{}).appendRequest(nil, request{typ: NBD_CMD_WRITE, flags: NBD_CMD_FLAG_FUA, n: 512}), make([]byte, 512)...),
		"writes":      append((&client{}).appendRequest(nil, request{typ: NBD_CMD_WRITE, n: 40 << 10}), make([]byte, 40<<10)...),
	}
	for name, one := range requests {
		for range 4 {
			if err := flood(t, silent(t, addr), one); !isTimeout(err) {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
	c := connect(t, addr, structured, "disk")
	c.want(request{typ: NBD_CMD_READ, n: 8 << 20}, nil, 0)
	c.want(request{typ: NBD_CMD_WRITE, n: 8 << 20}, make([]byte, 8<<20), 0)
	c.disconnect()
	if got, limit := heap()-before, int64(200<<20); got > limit {
		t.Errorf("heap of %d clients that do not read\n got %d MiB more\nwant %d at most", 4*len(requests), got>>20, limit>>20)
	}
}

// flood sends a request again and again until the server takes no more, or has
// taken far too much.
func flood(t *testing.T, c *client, one []byte) error {
	t.Helper()
	many := bytes.Repeat(one, max(1, (64<<10)/len(one)))
	for sent := 0; sent < 256<<20; sent += len(many) {
		c.conn.SetWriteDeadline(time.Now().Add(50 * time.Millisecond))
		if _, err := c.conn.Write(many); err != nil {
			return err
		}
	}
	return errors.New("the server takes requests without end")
}

// silent returns a client in the transmission phase that reads nothing by
// itself.
func silent(t *testing.T, addr net.Addr) *client {
	t.Helper()
	c := dial(t, addr)
	c.wantFinal(NBD_OPT_STRUCTURED_REPLY, nil, NBD_REP_ACK)
	c.wantFinal(NBD_OPT_GO, infoData("disk"), NBD_REP_ACK)
	return c
}

// heap is what the heap holds, in bytes.
func heap() int64 {
	debug.FreeOSMemory()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapSys - m.HeapReleased)
}

// TestMemory has 64 connections with 64 requests of 1 MiB in flight on each:
// reads whose replies are not taken, and writes in a device that hangs.
func TestMemory(t *testing.T) {
	const limit = 256 << 20
	dev, entered, release := gated("write")
	for i := range dev.data {
		dev.data[i] = 1
	}
	_, addr := startServer(t, Options{Exports: newShelf(map[string]Device{"disk": dev})})
	before := heap()
	read := (&client{}).appendRequest(nil, request{typ: NBD_CMD_READ, n: 1 << 20})
	write := append((&client{}).appendRequest(nil, request{typ: NBD_CMD_WRITE, n: 1 << 20}), make([]byte, 1<<20)...)
	var peak atomic.Int64
	for i := range 64 {
		c := silent(t, addr)
		one := read
		if i%2 == 0 {
			one = write
		}
		for range 64 {
			c.conn.SetWriteDeadline(time.Now().Add(20 * time.Millisecond))
			if _, err := c.conn.Write(one); err != nil {
				break // the server takes no more, as it should
			}
		}
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		peak.Store(max(peak.Load(), int64(m.HeapSys-m.HeapReleased)-before))
	}
	<-entered
	close(release)
	t.Logf("peak of the heap: %d MiB", peak.Load()>>20)
	if peak.Load() > limit {
		t.Errorf("peak of the heap\n got %d MiB\nwant %d at most", peak.Load()>>20, limit>>20)
	}
}

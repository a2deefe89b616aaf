// How much memory the daemon takes, as the kernel counts it.

package test

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// production builds blksnap as it is installed: static and without the race
// detector, whose own memory is several times the program's.
func production(t *testing.T) string {
	t.Helper()
	path := filepath.Join(scratch(t), "blksnap")
	sh(t, `CGO_ENABLED=0 go build -o "$1" blksnap`, path)
	return path
}

// resident returns the largest resident set size that a process has had, in
// bytes.
func resident(t *testing.T, pid int) int64 {
	t.Helper()
	for line := range strings.Lines(read(t, fmt.Sprintf("/proc/%d/status", pid))) {
		var n int64
		if _, err := fmt.Sscanf(line, "VmHWM: %d kB", &n); err == nil {
			return n * kiB
		}
	}
	t.Fatalf("/proc/%d/status has no VmHWM", pid)
	return 0
}

// Sixty-four clients with 64 requests of 1 MiB each, 4 GiB in all, and then with
// smaller ones, for which the memory of the larger ones is of no use. Most take
// none of their replies, to reads that are served at once and to such as are not;
// the others stop within the payload of a write. Another client is served
// meanwhile.
func TestMemoryIsBounded(t *testing.T) {
	needRoot(t)
	const clients, inFlight, most = 64, 64 * miB, 256 * miB
	d := newDaemon(t, nil)
	d.path = production(t)
	d.start(makeOrigin(t, d.dir, "vda", 64*miB))
	mkdir(t, d.snapshot("s1"))

	for _, n := range []int{miB, 64 * kiB, 32 * miB, 4 * kiB} {
		var greedy []*nbdConn
		var flooding sync.WaitGroup
		for i := range clients {
			c := d.open([]string{"vda@s1", "vda@s1", "vda", "vda"}[i%4])
			greedy = append(greedy, c)
			flooding.Go(func() {
				if i%4 == 3 {
					p := encodeRequest(NBD_CMD_WRITE, 0, 1, 0, uint32(n), make([]byte, n))
					flood(c, p, min(16, 16*miB/n))
					flood(c, p[:len(p)-1], 1)
					return
				}
				flood(c, encodeRequest(NBD_CMD_READ, 0, 1, 0, uint32(n), nil), inFlight/n)
			})
		}
		flooding.Wait()
		other := d.open("vda")
		p := make([]byte, 8*miB)
		for off := range other.size / int64(len(p)) {
			if err := other.readAt(p, off*int64(len(p))); err != nil {
				t.Fatalf("a client that takes its replies: %v", err)
			}
		}
		for _, c := range append(greedy, other) {
			c.Close()
		}
		t.Logf("requests of %d bytes: %d MiB at most", n, resident(t, d.cmd.Process.Pid)/miB)
	}
	if got := resident(t, d.cmd.Process.Pid); got > most {
		t.Errorf("the daemon's memory\n got %d MiB\nwant %d MiB at most", got/miB, most/miB)
	}
}

// flood sends a request n times, or as often as the server takes it within the
// time that a write may take.
func flood(c *nbdConn, one []byte, n int) {
	for range n {
		c.SetWriteDeadline(time.Now().Add(time.Second))
		if _, err := c.Write(one); errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, net.ErrClosed) {
			return
		}
	}
}

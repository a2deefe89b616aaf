package cow

import (
	"bytes"
	"errors"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"blksnap/store"
)

// openCopier makes a copier over a part that may hang, or says that it cannot, and
// n slots that are neighbours.
func openCopier(t *testing.T, hangs bool, n int) (*copier, *part, []store.Slot) {
	t.Helper()
	m, err := store.OpenMem(16 << 20)
	if err != nil {
		t.Fatal(err)
	}
	p := &part{Part: m, hangs: hangs}
	pool := store.NewPool(p)
	c := newCopier(pool)
	slots, masks := make([]store.Slot, n), make([]uint16, n)
	for k := range masks {
		masks[k] = allBlocks
	}
	if got, err := pool.Alloc(slots, masks); got != n {
		t.Fatalf("allocate %d slots: got %d, %v", n, got, err)
	}
	t.Cleanup(func() {
		select {
		case <-c.quit: // closed by the test
		default:
			c.close()
		}
		if err := pool.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return c, p, slots
}

func soon() time.Time { return time.Now().Add(10 * time.Second) }

func TestCopierCopies(t *testing.T) {
	for _, tc := range []struct {
		name  string
		hangs bool
	}{{"part that may hang", true}, {"part that does not hang", false}} {
		t.Run(tc.name, inBubble(func(t *testing.T) {
			c, _, slots := openCopier(t, tc.hangs, 3)
			want := make([]byte, 2*chunkSize+100)
			for k := range want {
				want[k] = byte(k * 7 / 5)
			}
			// From the middle of the first slot into the third.
			if err := c.write(slots[0], want, 8192, soon()); err != nil {
				t.Fatal(err)
			}
			got := make([]byte, len(want)-chunkSize)
			if err := c.read(slots[1], got, 8192, soon()); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, want[chunkSize:]) {
				t.Error("read back other bytes than were written")
			}
		}))
	}
}

func TestCopierTellsErrors(t *testing.T) {
	for _, tc := range []struct {
		name  string
		hangs bool
	}{{"part that may hang", true}, {"part that does not hang", false}} {
		t.Run(tc.name, inBubble(func(t *testing.T) {
			c, p, slots := openCopier(t, tc.hangs, 1)
			p.hook(func(string, int64, int64) error { return errIO })
			for op, err := range map[string]error{
				"read":  c.read(slots[0], make([]byte, 1), 0, soon()),
				"write": c.write(slots[0], make([]byte, 1), 0, soon()),
			} {
				if !errors.Is(err, errIO) || errors.Is(err, errSlotWrite) != (op == "write") || errors.Is(err, errStuck) {
					t.Errorf("%s: got %v, want the part's error, as one of a %s", op, err, op)
				}
			}
		}))
	}
}

// TestCopierGivesUp checks that a request that hangs is waited for exactly until
// the deadline, disturbs no other, and is not answered to somebody else when it
// comes back at last.
func TestCopierGivesUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, p, slots := openCopier(t, true, 2)
		entered, release := stop(p.hook, "write", 0)
		start := time.Now()
		err := c.write(slots[0], make([]byte, 1), 0, start.Add(10*time.Second))
		if !errors.Is(err, errStuck) || !errors.Is(err, errSlotWrite) {
			t.Errorf("a write that hangs: got %v, want errStuck", err)
		}
		if got := time.Since(start); got != 10*time.Second {
			t.Errorf("gave up after %v, want 10s", got)
		}
		<-entered
		good := make([]byte, blockSize)
		for range 3 {
			if err := c.write(slots[1], good, 0, soon()); err != nil {
				t.Errorf("a write while another hangs: %v", err)
			}
		}
		p.hook(func(string, int64, int64) error { return errIO })
		close(release)
		synctest.Wait() // the hanging one succeeds; whoever gets its answer is told wrong
		for range 10 {
			if err := c.write(slots[1], good, 0, soon()); !errors.Is(err, errIO) {
				t.Errorf("a write that fails, after another came back: got %v, want %v", err, errIO)
			}
		}
	})
}

// TestCopierDeadlineIsOver checks that a request whose time is up before it begins
// does not wait.
func TestCopierDeadlineIsOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, p, slots := openCopier(t, true, 1)
		_, release := stop(p.hook, "write", 0)
		start := time.Now()
		if err := c.write(slots[0], make([]byte, 1), 0, start.Add(-time.Second)); !errors.Is(err, errStuck) {
			t.Errorf("got %v, want errStuck", err)
		}
		if got := time.Since(start); got != 0 {
			t.Errorf("waited for %v, want 0", got)
		}
		close(release)
	})
}

// workers is how many workers of copiers there are in the bubble when everybody
// waits.
func workers() (n int) {
	synctest.Wait()
	b := make([]byte, 1<<20)
	for g := range strings.SplitSeq(string(b[:runtime.Stack(b, true)]), "\n\n") {
		head, frames, _ := strings.Cut(g, "\n")
		if strings.Contains(head, "synctest bubble") && strings.Contains(frames, "(*copier).work") {
			n++
		}
	}
	return n
}

// TestCopierWorkers checks that there are as many workers as were busy at once, that
// they are used again, and that all are gone after close, the one that hung too.
func TestCopierWorkers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const many = 8
		c, p, slots := openCopier(t, true, 1)
		read := func() error { return c.read(slots[0], make([]byte, 1), 0, soon()) }
		for range 20 {
			if err := read(); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
		}
		if got := workers(); got != 1 {
			t.Errorf("one request after the other: got %d workers, want 1", got)
		}
		release := make(chan struct{})
		p.hook(func(string, int64, int64) error {
			<-release
			return nil
		})
		var reads []chan error
		for range many {
			reads = append(reads, begin(read))
		}
		for _, r := range reads {
			waitsOn(t, r, "a read of a part that hangs")
		}
		close(release)
		for _, r := range reads {
			ends(t, r, "a read")
		}
		if got := workers(); got != many {
			t.Errorf("after %d requests at once: got %d workers, want %d", many, got, many)
		}
		stuck, comeBack := stop(p.hook, "read", 0)
		if err := read(); !errors.Is(err, errStuck) {
			t.Errorf("a read that hangs: got %v, want errStuck", err)
		}
		<-stuck
		c.close()
		if got := workers(); got != 1 {
			t.Errorf("after close: got %d workers, want the one that hangs", got)
		}
		close(comeBack)
		if got := workers(); got != 0 {
			t.Errorf("after the last one came back: got %d workers, want 0", got)
		}
	})
}

// TestCopierNeedsNoWorker checks that where nothing hangs nobody else is asked.
func TestCopierNeedsNoWorker(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, _, slots := openCopier(t, false, 1)
		if err := c.write(slots[0], make([]byte, 1), 0, time.Time{}); err != nil {
			t.Error(err)
		}
		if got := workers(); got != 0 {
			t.Errorf("got %d workers, want 0", got)
		}
	})
}

// TestCopierForMany has many copy at once, each its own bytes.
func TestCopierForMany(t *testing.T) {
	const many = 16
	c, _, slots := openCopier(t, true, many)
	var users sync.WaitGroup
	for k, s := range slots {
		users.Go(func() {
			for round := range byte(100) {
				want := bytes.Repeat([]byte{byte(k), round}, blockSize/2)
				got := make([]byte, blockSize)
				if err := errors.Join(c.write(s, want, 0, soon()), c.read(s, got, 0, soon())); err != nil {
					t.Error(err)
					return
				}
				if !bytes.Equal(got, want) {
					t.Errorf("slot %v, round %d: got other bytes than were written", s, round)
					return
				}
			}
		})
	}
	users.Wait()
}

// TestLateWriteReachesNobody lets a write that was given up reach the snapstore
// when others have used its device for long: neither its slot nor its buffer is
// theirs.
func TestLateWriteReachesNobody(t *testing.T) {
	for _, tc := range []struct {
		name string
		used bool // the slot holds other blocks already
	}{{"new slot", false}, {"slot in use", true}} {
		t.Run(tc.name, inBubble(func(t *testing.T) {
			const size = 2 << 20
			r := newEmptyRig(t)
			r.add(16<<20, true)
			r.addPart(16 << 20) // while the first one hangs
			r.stuck = blockSize
			d := r.addDevice("d0", size, Config{})
			at := int64(5 * blockSize)
			put(t, d, 5, 0, size)
			put(t, d, 1, at, blockSize)
			first := r.take("first")
			if tc.used {
				put(t, d, 2, 0, blockSize)
			}
			entered, release := stop(r.parts[0].hook, "write", at)
			put(t, d, 3, at, blockSize)
			<-entered
			want(t, image(t, first, "d0"), 1, at, blockSize) // from the other part
			r.destroy(first)
			before := make([]byte, size)
			if err := d.Read(before, 0); err != nil {
				t.Fatal(err)
			}
			second := r.take("second")
			put(t, d, 4, 0, size)
			close(release)
			synctest.Wait()
			got := make([]byte, size)
			if err := image(t, second, "d0").Read(got, 0); err != nil {
				t.Fatal(err)
			}
			compare(t, "the next snapshot", got, before, 0)
			late := make([]byte, blockSize)
			if _, err := r.parts[0].Part.ReadAt(late, at); err != nil {
				t.Fatal(err)
			}
			if late[0] != 1 {
				t.Errorf("the late write wrote %d, want 1: its buffer was used again", late[0])
			}
		}))
	}
}

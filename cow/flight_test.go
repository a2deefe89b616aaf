package cow

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"blksnap/store"
)

// attempt is a call of TryWrite by a goroutine that may come to hang in it.
type attempt struct {
	left   chan error // what TryWrite returned
	result chan error // of the write, whoever has made it
}

// try writes p at off as the reader of a connection does.
func try(d *Device, p []byte, off int64) *attempt {
	a := &attempt{make(chan error, 1), make(chan error, 1)}
	go func() {
		err := d.TryWrite(p, off, func(rest func() error) { go func() { a.result <- rest() }() })
		if err != errTaken {
			a.result <- err
		}
		a.left <- err
	}()
	return a
}

// tryWrite waits for the result of try.
func tryWrite(d *Device, p []byte, off int64) error { return <-try(d, p, off).result }

// mustFly writes v at once.
func mustFly(t *testing.T, d *Device, v byte, off, n int64) {
	t.Helper()
	if err := d.TryWrite(bytes.Repeat([]byte{v}, int(n)), off, mustNotTake(t)); err != nil {
		t.Fatalf("try to write %d bytes at %d: %v", n, off, err)
	}
}

func mustNotTake(t *testing.T) func(func() error) {
	return func(func() error) { t.Error("a write that does not hang was taken over") }
}

// TestFlight writes where blocks are preserved on the way, each time once.
func TestFlight(t *testing.T) {
	const b = int64(blockSize)
	const size = 20*chunkSize + 3*b + 512
	for _, tc := range []struct {
		name   string
		off, n int64
		slots  int64 // blocks that the snapstore holds then
	}{
		{"a block", 5 * b, b, 1},
		{"the first block", 0, b, 1},
		{"many blocks", 2 * b, 9 * b, 9},
		{"a whole chunk", chunkSize, chunkSize, 16},
		{"parts of two chunks", chunkSize - 2*b, 5 * b, 5},
		{"parts of three chunks", chunkSize - b, chunkSize + 3*b, 19},
		{"as much as there may be", 4*chunkSize - b, tryWriteLimit, 32},
		{"a block beside the end", size - b - 512, b, 1},
	} {
		for _, hangs := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, may hang %t", tc.name, hangs), inBubble(func(t *testing.T) {
				r := newEmptyRig(t)
				r.add(16<<20, hangs)
				d := r.addDevice("d0", size, Config{})
				put(t, d, 1, 0, size)
				older := r.take("older")
				mustFly(t, d, 2, tc.off, tc.n)
				if _, used, _ := r.pool.Space(); used != tc.slots*b {
					t.Errorf("space in use: got %d blocks, want %d", used/b, tc.slots)
				}
				mustFly(t, d, 3, tc.off, tc.n)
				newer := r.take("newer")
				mustFly(t, d, 4, tc.off, tc.n)
				if _, used, _ := r.pool.Space(); used != 2*tc.slots*b {
					t.Errorf("space in use after another snapshot: got %d blocks, want %d", used/b, 2*tc.slots)
				}
				want(t, image(t, older, "d0"), 1, 0, size)
				want(t, image(t, newer, "d0"), 3, tc.off, tc.n)
				want(t, image(t, newer, "d0"), 1, 0, tc.off)
				want(t, image(t, newer, "d0"), 1, tc.off+tc.n, size-tc.off-tc.n)
				want(t, d, 4, tc.off, tc.n)
				if got := workers(); got != 0 {
					t.Errorf("got %d workers of the copier, want 0: who tries does it all", got)
				}
			}))
		}
	}
}

// TestFlightAddsToSlot preserves the blocks of a chunk one after the other.
func TestFlightAddsToSlot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newEmptyRig(t)
		r.add(1<<20, true)
		d := r.addDevice("d0", 4*chunkSize, Config{})
		put(t, d, 1, 0, 4*chunkSize)
		s := r.take("s")
		for k := range int64(blocksPerChunk) {
			mustFly(t, d, byte(2+k), chunkSize+k*7%blocksPerChunk*blockSize, blockSize)
		}
		want(t, image(t, s, "d0"), 1, 0, 4*chunkSize)
		if got := image(t, s, "d0").layer.table.load(1); got.mask() != allBlocks {
			t.Errorf("the chunk's blocks: got %016b, want all, in one slot", got.mask())
		}
		if got := image(t, s, "d0").layer.table.load(1); got.blocks() != blocksPerChunk {
			t.Errorf("blocks in the slot: got %d, want %d", got.blocks(), blocksPerChunk)
		}
	})
}

// TestFlightOverHoles preserves holes without a slot, and zeroes that are none in one.
func TestFlightOverHoles(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newEmptyRig(t)
		r.add(1<<20, true)
		d := r.addDevice("d0", 4*chunkSize, Config{})
		put(t, d, 0, 2*chunkSize, blockSize)
		put(t, d, 1, 3*chunkSize, chunkSize)
		s := r.take("s")
		for _, tc := range []struct {
			name string
			off  int64
			n    int64
			want int64 // blocks in use
		}{
			{"a hole", 0, blockSize, 0},
			{"zeroes", 2 * chunkSize, blockSize, 1},
			{"a hole beside data", 2*chunkSize + 3*blockSize, blockSize, 2},
		} {
			mustFly(t, d, 9, tc.off, tc.n)
			if _, used, _ := r.pool.Space(); used != tc.want*blockSize {
				t.Errorf("%s: %d blocks in use, want %d", tc.name, used/blockSize, tc.want)
			}
		}
		// A hole and data in one: the hole is done, the rest takes the long way.
		if err := tryWrite(d, make([]byte, chunkSize), 2*chunkSize+8*blockSize); err != nil && err != syscall.EAGAIN {
			t.Error(err)
		}
		want(t, image(t, s, "d0"), 0, 0, 3*chunkSize)
		want(t, image(t, s, "d0"), 1, 3*chunkSize, chunkSize)
	})
}

// TestNoFlight lets each thing stand in the way for which the long way is there: nothing
// has changed then.
func TestNoFlight(t *testing.T) {
	const b = int64(blockSize)
	nothing := func(*rig) func() { return func() {} }
	for _, tc := range []struct {
		name   string
		off, n int64
		before func(r *rig) (after func())
	}{
		{"bytes at no boundary", 1, b, nothing},
		{"less than a block", 0, 512, nothing},
		{"too much", 0, tryWriteLimit + b, nothing},
		{"a gap in what is missing", 0, 3 * b, func(r *rig) func() {
			put(r.t, r.devs[0], 1, b, b)
			return func() {}
		}},
		{"two slots that are apart", chunkSize - b, 2 * b, func(r *rig) func() {
			put(r.t, r.devs[0], 1, 0, b)
			put(r.t, r.devs[0], 1, 2*chunkSize-b, b)
			return func() {}
		}},
		{"the chunk's lock", 0, b, func(r *rig) func() {
			r.devs[0].chunkLocks.lock(0, 0)
			return func() { r.devs[0].chunkLocks.unlock(0, 0) }
		}},
		{"the lock of the second chunk", chunkSize - b, 2 * b, func(r *rig) func() {
			r.devs[0].chunkLocks.lock(1, 1)
			return func() { r.devs[0].chunkLocks.unlock(1, 1) }
		}},
		{"an origin that is not in memory", 0, b, func(r *rig) func() {
			return failing(r.disks[0].hook, "read", syscall.EAGAIN)
		}},
		{"an origin whose holes cannot be found", 40 * chunkSize, b, func(r *rig) func() {
			return failing(r.disks[0].hook, "next", errIO)
		}},
		{"a table that has to grow", 0, b, func(r *rig) func() {
			tab := r.devs[0].shield.Load().head().table
			used := tab.used
			tab.used = tab.mem.Len()
			return func() { tab.used = used }
		}},
		{"a table that grows", 0, b, func(r *rig) func() {
			tab := r.devs[0].shield.Load().head().table
			tab.mu.Lock()
			return tab.mu.Unlock
		}},
		{"a snapstore that fails", 0, b, func(r *rig) func() {
			return failing(r.parts[0].hook, "write", errIO)
		}},
		{"a snapstore without backing", 0, b, func(r *rig) func() {
			return failing(r.parts[0].hook, "write", syscall.ENOSPC)
		}},
		{"a part that fails under a slot in use", 0, b, func(r *rig) func() {
			put(r.t, r.devs[0], 1, b, b)
			return failing(r.parts[0].hook, "write", errIO)
		}},
		{"a full snapstore", 0, b, func(r *rig) func() { return fillUp(r, 0) }},
		{"a snapstore with room for one of two", chunkSize - b, 2 * b, func(r *rig) func() { return fillUp(r, b) }},
		{"a snapshot's limit", 0, b, func(r *rig) func() {
			s := r.takeWith(TakeOptions{MaxStore: blockSize}, "limited")
			put(r.t, r.devs[0], 1, 3*chunkSize, b)
			return func() { r.destroy(s) }
		}},
		{"a shut gate", 0, b, func(r *rig) func() {
			r.devs[0].writers.shut()
			return r.devs[0].writers.open
		}},
		{"a store that was slow lately", 0, b, func(r *rig) func() {
			r.devs[0].copier.resting.Store(true)
			return func() { r.devs[0].copier.resting.Store(false) }
		}},
	} {
		t.Run(tc.name, inBubble(func(t *testing.T) {
			const size, data = 41 * chunkSize, 40 * chunkSize // the rest is a hole
			r := newEmptyRig(t)
			r.add(2<<20, true)
			r.addPart(1 << 20)
			d := r.addDevice("d0", size, Config{})
			put(t, d, 1, 0, data)
			s := r.take("s")
			after := tc.before(r)
			_, used, _ := r.pool.Space()
			if err := d.TryWrite(make([]byte, tc.n), tc.off, mustNotTake(t)); err != syscall.EAGAIN {
				t.Errorf("try to write: got %v, want EAGAIN", err)
			}
			if _, got, _ := r.pool.Space(); got != used {
				t.Errorf("space in use: got %d, want %d as before", got, used)
			}
			r.disks[0].hook(nil)
			want(t, d, 1, 0, data)
			after()
			put(t, d, 2, tc.off, tc.n) // nothing is locked
			want(t, image(t, s, "d0"), 1, 0, data)
		}))
	}
}

// fillUp leaves room for so many bytes in the snapstore, until the function that it
// returns is called.
func fillUp(r *rig, room int64) func() {
	r.t.Helper()
	var slots []store.Slot
	var masks []uint16
	for r.pool.Room() > room {
		mask := uint16(1)
		if r.pool.Room() >= room+chunkSize {
			mask = allBlocks
		}
		slot := make([]store.Slot, 1)
		if _, err := r.pool.Alloc(slot, []uint16{mask}); err != nil {
			r.t.Fatal(err)
		}
		slots, masks = append(slots, slot[0]), append(masks, mask)
	}
	return func() {
		for k, s := range slots {
			r.pool.Free(s, masks[k])
		}
	}
}

// failing makes operations op of a hooked thing fail, until the function that it
// returns is called.
func failing(hook func(func(string, int64, int64) error), op string, err error) func() {
	hook(func(o string, _, _ int64) error {
		if o == op {
			return err
		}
		return nil
	})
	return func() { hook(nil) }
}

// TestNoFlightWithoutTaker checks that who cannot be taken over from is not held up.
func TestNoFlightWithoutTaker(t *testing.T) {
	r := newRig(t, 1, 1<<20, 1<<20)
	put(t, r.devs[0], 1, 0, 1<<20)
	r.take("s")
	if err := r.devs[0].TryWrite(make([]byte, blockSize), 0, nil); err != syscall.EAGAIN {
		t.Errorf("got %v, want EAGAIN", err)
	}
}

// TestFlightTakenOver lets parts of the snapstore hang, fail late and be slow under a
// flight: the write ends in time all the same, with the right bytes in the origin, and
// the snapshot is kept where it can be. What comes back late changes nothing.
func TestFlightTakenOver(t *testing.T) {
	const b, limit = int64(blockSize), 10 * time.Second
	const slack = 2 * watchInterval
	for _, tc := range []struct {
		name  string
		parts string // of each part: h hangs, s is slow, e fails slowly, . is sound
		used  bool   // the chunk has a slot in the first part already
		n     int64
		want  string // the snapshot's state
		after time.Duration
		late  error // what comes back at last
	}{
		{"the only one hangs", "h", false, b, "failed", limit, nil},
		{"the only one hangs and then fails", "h", false, b, "failed", limit, errIO},
		{"the first hangs", "h.", false, b, "ok", limit / 2, nil},
		{"the first hangs, and then fails", "h.", false, b, "ok", limit / 2, errIO},
		{"the first hangs, for many blocks", "h.", false, 2 * chunkSize, "ok", limit / 2, nil},
		{"two hang", "hh.", false, b, "ok", 3 * limit / 4, nil},
		{"all hang", "hh", false, b, "failed", limit, nil},
		{"the only one is slow", "s", false, b, "ok", 8 * time.Second, nil},
		{"the first is slow", "s.", false, b, "ok", limit / 2, nil},
		{"the only one fails slowly", "e", false, b, "overflowed", time.Second, nil},
		{"the first fails slowly", "e.", false, b, "ok", time.Second, nil},
		{"the chunk's slot hangs", "h.", true, b, "ok", limit / 2, nil},
		{"the chunk's slot fails slowly", "e.", true, b, "ok", time.Second, nil},
	} {
		t.Run(tc.name, inBubble(func(t *testing.T) {
			const size = 1 << 20
			r := newEmptyRig(t)
			for range tc.parts {
				r.add(4<<20, true)
			}
			d := r.addDevice("d0", size, Config{PreserveLimit: limit})
			put(t, d, 1, 0, size)
			s := r.take("s")
			at := 5 * b
			if tc.n > chunkSize {
				at = 4 * chunkSize
			}
			if tc.used {
				put(t, d, 2, 0, b)
			}
			release := make(chan struct{})
			for k, what := range tc.parts {
				if what == '.' {
					continue
				}
				r.parts[k].hook(func(op string, _, _ int64) error {
					switch {
					case op == "read":
					case what == 's':
						time.Sleep(8 * time.Second)
					case what == 'e':
						time.Sleep(time.Second)
						return errIO
					default:
						<-release
						return tc.late
					}
					return nil
				})
			}
			begun := time.Now()
			w := try(d, bytes.Repeat([]byte{3}, int(tc.n)), at)
			waitsOn(t, w.result, "the write")
			time.Sleep(time.Duration(flightLooks+2) * watchInterval)
			synctest.Wait()
			want(t, d, 1, 8*chunkSize, chunkSize) // reads go on
			if err := tryWrite(d, make([]byte, b), 8*chunkSize); err != syscall.EAGAIN {
				t.Errorf("another write while one is taken over: got %v, want EAGAIN", err)
			}
			if err := <-w.result; err != nil {
				t.Errorf("the write: %v", err)
			}
			if got := time.Since(begun); got > tc.after+slack || got < tc.after-slack-watchInterval*flightLooks {
				t.Errorf("the write took %v, want about %v", got, tc.after)
			}
			want(t, d, 3, at, tc.n)
			if got := states(s); got != tc.want {
				t.Errorf("state: got %q, want %s", s.State(), tc.want)
			}
			for _, p := range r.parts {
				p.hook(nil)
			}
			before := make([]byte, size)
			if err := d.Read(before, 0); err != nil {
				t.Fatal(err)
			}
			close(release)
			if err := <-w.left; err != errTaken {
				t.Errorf("who was taken over from: got %v, want errTaken", err)
			}
			if tc.want == "ok" {
				want(t, image(t, s, "d0"), 1, 0, size)
			}
			// Everything goes on as ever.
			r.destroy(s)
			next := r.take("next")
			put(t, d, 4, 0, size)
			got := make([]byte, size)
			if err := image(t, next, "d0").Read(got, 0); err == nil {
				compare(t, "the next snapshot", got, before, 0)
			} else if !strings.Contains(tc.parts, ".") && tc.parts != "s" {
				// Parts that failed give no more room.
			} else {
				t.Errorf("the next snapshot: %v", err)
			}
			d.settle(time.Minute)
			hung := strings.Count(strings.TrimRight(tc.parts, "."), "h")
			if tc.parts == "s." {
				hung = 1
			}
			r.stuck = tc.n * int64(hung)
		}))
	}
}

// TestFlightLandsLate lets a call come back just after it was taken over.
func TestFlightLandsLate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newEmptyRig(t)
		r.add(1<<20, true)
		d := r.addDevice("d0", 1<<20, Config{})
		put(t, d, 1, 0, 1<<20)
		s := r.take("s")
		entered, release := stop(r.parts[0].hook, "write", 0)
		w := try(d, bytes.Repeat([]byte{2}, blockSize), 0)
		<-entered
		synctest.Wait()
		time.Sleep((flightLooks + 2) * watchInterval)
		close(release)
		if err := <-w.result; err != nil {
			t.Error(err)
		}
		if err := <-w.left; err != errTaken {
			t.Errorf("who was taken over from: got %v, want errTaken", err)
		}
		want(t, d, 2, 0, blockSize)
		want(t, image(t, s, "d0"), 1, 0, 1<<20)
		if got := s.State(); got != "ok" {
			t.Errorf("state: got %q, want ok", got)
		}
		// Nobody flies until the store was quick for a while.
		if err := tryWrite(d, make([]byte, blockSize), chunkSize); err != syscall.EAGAIN {
			t.Errorf("right afterwards: got %v, want EAGAIN", err)
		}
		time.Sleep((watchPatience + 2) * watchInterval)
		mustFly(t, d, 3, chunkSize, blockSize)
	})
}

// TestWatchdogStaysForFlights has the watchdog about to end when somebody takes off who
// has still seen it run.
func TestWatchdogStaysForFlights(t *testing.T) {
	c, _, _ := openCopier(t, true, 1)
	f := newFlight(nil)
	c.watching.Store(true)
	c.flights[7].Store(f)
	if c.look(true) || !c.watching.Load() {
		t.Error("the watchdog has ended while somebody flies")
	}
	c.flights[7].Store(nil)
	if !c.look(true) || c.watching.Load() {
		t.Error("the watchdog goes on although nobody flies")
	}
}

// TestTakeDuringFlight takes a snapshot while a flight that was taken over waits: it
// fails in its time, names the device, and works when the write has ended.
func TestTakeDuringFlight(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newEmptyRig(t)
		r.add(1<<20, true)
		d := r.addDevice("d0", 1<<20, Config{})
		put(t, d, 1, 0, 1<<20)
		r.take("s")
		entered, release := stop(r.parts[0].hook, "write", 0)
		w := try(d, bytes.Repeat([]byte{2}, blockSize), 0)
		<-entered
		begun := time.Now()
		_, err := r.cat.Take("t", r.devs, TakeOptions{Limit: time.Second})
		if !errors.Is(err, syscall.ETIMEDOUT) || !strings.Contains(err.Error(), "d0") {
			t.Errorf("take: got %v, want ETIMEDOUT and the device's name", err)
		}
		if got := time.Since(begun); got != time.Second {
			t.Errorf("take failed after %v, want 1s", got)
		}
		close(release)
		if err := <-w.result; err != nil {
			t.Error(err)
		}
		u := r.take("u")
		mustWrite(t, d, 3, 0, blockSize)
		want(t, image(t, u, "d0"), 2, 0, blockSize)
	})
}

// mustWrite writes as a connection does, at once or not.
func mustWrite(t *testing.T, d *Device, v byte, off, n int64) {
	t.Helper()
	err := tryWrite(d, bytes.Repeat([]byte{v}, int(n)), off)
	if err == syscall.EAGAIN {
		put(t, d, v, off, n)
	} else if err != nil {
		t.Fatal(err)
	}
}

// TestFlightAndWriter has others write to the chunk of a flight: who may wait waits
// until the copy is published, who may not goes.
func TestFlightAndWriter(t *testing.T) {
	for _, tc := range []struct {
		name  string
		taken bool
	}{{"in flight", false}, {"taken over", true}} {
		t.Run(tc.name, inBubble(func(t *testing.T) {
			r := newEmptyRig(t)
			r.add(1<<20, true)
			d := r.addDevice("d0", 1<<20, Config{})
			put(t, d, 1, 0, 1<<20)
			s := r.take("s")
			entered, release := stop(r.parts[0].hook, "write", 0)
			w := try(d, bytes.Repeat([]byte{2}, blockSize), 0)
			<-entered
			if tc.taken {
				time.Sleep((flightLooks + 2) * watchInterval)
			}
			if err := tryWrite(d, make([]byte, blockSize), 0); err != syscall.EAGAIN {
				t.Errorf("who may not wait: got %v, want EAGAIN", err)
			}
			second := begin(func() error { return d.Write([]byte{3}, 7, false) })
			waitsOnNow(t, second, "a second write to the block")
			want(t, image(t, s, "d0"), 1, 0, 1<<20)
			close(release)
			if err := errors.Join(<-w.result, <-second); err != nil {
				t.Error(err)
			}
			want(t, image(t, s, "d0"), 1, 0, 1<<20)
			if _, used, _ := r.pool.Space(); used != blockSize {
				t.Errorf("space in use: got %d, want a block", used)
			}
		}))
	}
}

// waitsOnNow is waitsOn for who waits for a lock, which a bubble does not know of.
func waitsOnNow(t *testing.T, c chan error, what string) {
	t.Helper()
	select {
	case err := <-c:
		t.Errorf("%s ended too early, with %v", what, err)
		c <- err
	default:
	}
}

// TestCloseDuringFlight closes the device while a flight that was taken over waits.
func TestCloseDuringFlight(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newEmptyRig(t)
		r.add(1<<20, true)
		r.addPart(1 << 20)
		d := r.addDevice("d0", 1<<20, Config{})
		put(t, d, 1, 0, 1<<20)
		s := r.take("s")
		entered, release := stop(r.parts[0].hook, "write", 0)
		w := try(d, bytes.Repeat([]byte{2}, blockSize), 0)
		<-entered
		time.Sleep((flightLooks + 2) * watchInterval)
		if err := s.Destroy(true); err != nil {
			t.Error(err)
		}
		closed := begin(d.Close)
		waitsOn(t, closed, "the close of the device")
		if err := <-w.result; err != nil {
			t.Errorf("the write: %v", err)
		}
		ends(t, closed, "the close of the device")
		close(release)
		<-w.left
		r.devs = nil
		r.stuck = blockSize
	})
}

// TestFlightWaitsForSpace has a flight fail slowly for want of space, where writes wait
// for some.
func TestFlightWaitsForSpace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newEmptyRig(t)
		r.add(1<<20, true)
		d := r.addDevice("d0", 1<<20, Config{StoreWait: time.Minute})
		put(t, d, 1, 0, 1<<20)
		s := r.take("s")
		r.parts[0].hook(func(op string, _, _ int64) error {
			if op == "write" {
				time.Sleep(time.Second)
				return syscall.ENOSPC
			}
			return nil
		})
		w := try(d, bytes.Repeat([]byte{2}, blockSize), 0)
		time.Sleep(10 * time.Second)
		waitsOn(t, w.result, "the write")
		r.take("during") // the gate is left again and again
		r.addPart(1 << 20)
		if err := <-w.result; err != nil {
			t.Errorf("the write: %v", err)
		}
		<-w.left
		want(t, d, 2, 0, blockSize)
		want(t, image(t, s, "d0"), 1, 0, 1<<20)
	})
}

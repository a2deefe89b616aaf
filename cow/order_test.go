// Races that are held open by gates.

package cow

import (
	"errors"
	"strings"
	"syscall"
	"testing"
	"time"
)

// stop makes the next operation op that touches byte at of the hooked thing wait.
// entered is closed when it does; it goes on when release is closed.
func stop(hook func(func(string, int64, int64) error), op string, at int64) (entered, release chan struct{}) {
	entered, release = make(chan struct{}), make(chan struct{})
	once := make(chan struct{}, 1)
	once <- struct{}{}
	hook(func(o string, off, n int64) error {
		if o != op || at < off || at >= off+n {
			return nil
		}
		select {
		case <-once:
			close(entered)
			<-release
		default: // not the first
		}
		return nil
	})
	return entered, release
}

// begin runs f and returns where its result will be.
func begin(f func() error) chan error {
	c := make(chan error, 1)
	go func() { c <- f() }()
	return c
}

// stillWaits checks that what c reports has not ended. A correct engine passes
// every time; a wrong one is caught if it ends within the wait.
func stillWaits(t *testing.T, c chan error, what string) {
	t.Helper()
	select {
	case err := <-c:
		t.Errorf("%s ended too early, with %v", what, err)
		c <- err // somebody waits for it
	case <-time.After(30 * time.Millisecond):
	}
}

func TestReadOfOriginOvertakenByWrite(t *testing.T) {
	r := newRig(t, 1, 1<<20, 16<<20)
	d, k := r.devs[0], r.disks[0]
	put(t, d, 1, 0, 1<<20)
	i := image(t, r.take("s"), "d0")

	// The image finds the block in the origin, and reads it only after a write.
	entered, release := stop(k.hook, "read", 8192)
	got := make([]byte, 3*blockSize)
	read := begin(func() error { return i.Read(got, 4096) })
	<-entered
	k.hook(nil)
	put(t, d, 2, 8192, 4096)
	close(release)
	if err := <-read; err != nil {
		t.Fatal(err)
	}
	for n, b := range got {
		if b != 1 {
			t.Fatalf("byte %d of the image: got %d, which was written after the snapshot", n, b)
		}
	}
}

func TestReadNoticesOverflow(t *testing.T) {
	r := newRig(t, 1, 8<<20, 1<<20)
	d, k := r.devs[0], r.disks[0]
	put(t, d, 1, 0, 8<<20)
	s := r.take("s")
	i := image(t, s, "d0")

	entered, release := stop(k.hook, "read", 0)
	read := begin(func() error { return i.Read(make([]byte, 4096), 0) })
	<-entered
	k.hook(nil)
	put(t, d, 2, 0, 8<<20) // more than the store holds
	close(release)
	if err := <-read; !errors.Is(err, ErrOverflowed) || !errors.Is(err, syscall.EIO) {
		t.Errorf("a read in the middle of which the store overflowed: got %v, want ErrOverflowed", err)
	}
	if got := s.State(); got != "overflowed" {
		t.Errorf("state: got %q, want overflowed", got)
	}
	if !r.event(EventSnapshotOverflowed, "s") {
		t.Error("no event told of the overflow")
	}
	want(t, d, 2, 0, 8<<20)
}

func TestTakeWaitsForWrite(t *testing.T) {
	r := newRig(t, 2, 1<<20, 16<<20)
	put(t, r.devs[0], 1, 0, 4096)
	entered, release := stop(r.disks[0].hook, "write", 0)
	write := begin(func() error { return r.devs[0].Write(make([]byte, 4096), 0, false) })
	<-entered

	var s *Snapshot
	take := begin(func() (err error) { s, err = r.cat.Take("s", r.devs, TakeOptions{Limit: time.Minute}); return err })
	stillWaits(t, take, "the snapshot")
	// A write that comes after the gate was shut is not in the snapshot.
	late := begin(func() error { return r.devs[1].Write([]byte{9}, 0, false) })
	stillWaits(t, late, "a write to the other device")
	close(release)
	for what, c := range map[string]chan error{"write": write, "take": take, "late write": late} {
		if err := <-c; err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	want(t, image(t, s, "d0"), 0, 0, 4096)
	want(t, image(t, s, "d1"), 0, 0, 4096)
	want(t, r.devs[1], 9, 0, 1)
}

func TestTakeGivesUpOnHangingOrigin(t *testing.T) {
	r := newRig(t, 2, 1<<20, 16<<20)
	entered, release := stop(r.disks[1].hook, "write", 0)
	write := begin(func() error { return r.devs[1].Write([]byte{1}, 0, false) })
	<-entered
	_, err := r.cat.Take("s", r.devs, TakeOptions{Limit: 20 * time.Millisecond})
	if !errors.Is(err, syscall.ETIMEDOUT) || !strings.Contains(err.Error(), "d1") {
		t.Errorf("take: got %v, want ETIMEDOUT and the name of the device that hangs", err)
	}
	put(t, r.devs[0], 2, 0, 4096) // goes on
	number := r.devs[0].Changes().Number()
	close(release)
	if err := <-write; err != nil {
		t.Error(err)
	}
	s := r.take("s")
	if got := image(t, s, "d0").Changes().Number(); got != number+1 {
		t.Errorf("number after a snapshot that failed: got %d, want %d", got, number+1)
	}
	want(t, image(t, s, "d1"), 1, 0, 1)
}

func TestWriteWaitsForCopyOfItsChunk(t *testing.T) {
	r := newRig(t, 1, 1<<20, 16<<20)
	d := r.devs[0]
	put(t, d, 1, 0, 1<<20)
	i := image(t, r.take("s"), "d0")
	entered, release := stop(r.parts[0].hook, "write", 0)
	first := begin(func() error { return d.Write([]byte{2}, 0, false) })
	<-entered
	// Until the copy is published nobody may change the block.
	second := begin(func() error { return d.Write([]byte{3}, 1, false) })
	stillWaits(t, second, "a second write to the block")
	put(t, d, 4, 512<<10, 4096) // another chunk goes on
	want(t, i, 1, 0, 1<<20)
	close(release)
	if err := errors.Join(<-first, <-second); err != nil {
		t.Fatal(err)
	}
	want(t, i, 1, 0, 1<<20)
}

func TestFoldUnderReader(t *testing.T) {
	for _, tc := range []struct {
		name string
		own  bool // the older image's layer has another block of the chunk
	}{
		{"slot moves", false},
		{"slots are joined", true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := newRig(t, 1, 1<<20, 16<<20)
			d := r.devs[0]
			put(t, d, 1, 0, 1<<20)
			s1 := r.take("s1")
			if tc.own {
				put(t, d, 1, 8*blockSize, blockSize)
			}
			s2 := r.take("s2")
			put(t, d, 2, 0, blockSize)
			r.take("s3") // so that the layer of s2 is not the head
			put(t, d, 3, 0, blockSize)

			entered := make(chan struct{})
			release := make(chan struct{})
			r.parts[0].hook(func(op string, off, n int64) error {
				if op == "read" {
					r.parts[0].hook(nil)
					close(entered)
					<-release
				}
				return nil
			})
			got := make([]byte, blockSize)
			read := begin(func() error { return image(t, s1, "d0").Read(got, 0) })
			<-entered
			_, before, _ := r.pool.Space()
			destroyed := begin(func() error { return s2.Destroy(false) })
			stillWaits(t, destroyed, "giving back a slot that is being read")
			if _, after, _ := r.pool.Space(); after < before {
				t.Errorf("space in use went from %d to %d while a reader was inside", before, after)
			}
			close(release)
			if err := errors.Join(<-read, <-destroyed); err != nil {
				t.Fatal(err)
			}
			if got[0] != 1 {
				t.Errorf("the image reads %d, want 1", got[0])
			}
			want(t, image(t, s1, "d0"), 1, 0, 1<<20)
		})
	}
}

func TestDestroyUnderReader(t *testing.T) {
	r := newRig(t, 1, 1<<20, 16<<20)
	d, k := r.devs[0], r.disks[0]
	put(t, d, 1, 0, 1<<20)
	s := r.take("s")
	entered, release := stop(k.hook, "read", 0)
	read := begin(func() error { return image(t, s, "d0").Read(make([]byte, 4096), 0) })
	<-entered
	k.hook(nil)
	destroyed := begin(func() error { return s.Destroy(true) })
	<-image(t, s, "d0").Gone()
	put(t, d, 2, 0, 4096) // nobody needs the old block any more
	close(release)
	if err := <-read; !errors.Is(err, ErrDestroyed) {
		t.Errorf("a read in the middle of which the snapshot was destroyed: got %v, want ErrDestroyed", err)
	}
	if err := <-destroyed; err != nil {
		t.Error(err)
	}
}

func TestHangingStoreIsGivenUp(t *testing.T) {
	r := newEmptyRig(t)
	r.add(16<<20, true)
	d := r.addDevice("d0", 1<<20, Config{PreserveLimit: 20 * time.Millisecond})
	put(t, d, 1, 0, 1<<20)
	s := r.take("s")
	put(t, d, 1, 32<<10, 4096) // the slot is in use before it hangs
	entered, release := stop(r.parts[0].hook, "write", 0)
	defer close(release)
	write := begin(func() error { return d.Write(make([]byte, 4096), 0, false) })
	<-entered
	if err := <-write; err != nil {
		t.Fatalf("the write: %v", err)
	}
	r.stuck = blockSize
	if got := s.State(); !strings.HasPrefix(got, "failed: ") {
		t.Errorf("state: got %q, want failed", got)
	}
	want(t, d, 0, 0, 4096)
	if err := image(t, s, "d0").Read(make([]byte, 1), 0); !errors.Is(err, syscall.EIO) {
		t.Errorf("image: got %v, want EIO", err)
	}
}

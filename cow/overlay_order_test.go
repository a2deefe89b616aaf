// Races of writes to images that are held open by gates.

package cow

import (
	"errors"
	"syscall"
	"testing"
	"time"
)

// TestLiveWriteOvertakesImageWrite holds a write to an image where it waits for a
// disk: writes of the device go on meanwhile, also in the same block, and the image
// has what the device held before around what was written.
func TestLiveWriteOvertakesImageWrite(t *testing.T) {
	for _, tc := range []struct {
		name string
		stop func(r *rig) (entered, release chan struct{})
	}{
		{"reads the rest of its block", func(r *rig) (_, _ chan struct{}) { return stop(r.disks[0].hook, "read", 0) }},
		{"writes its slot", func(r *rig) (_, _ chan struct{}) { return stop(r.parts[0].hook, "write", 0) }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := newRig(t, 1, 1<<20, 16<<20)
			d := r.devs[0]
			put(t, d, 1, 0, 1<<20)
			s := r.takeWritable("s")
			i := image(t, s, "d0")
			entered, release := tc.stop(r)
			write := begin(func() error { return i.Write([]byte{2}, 100, false) })
			<-entered
			put(t, d, 3, 0, 4096)
			want(t, d, 3, 0, 4096)
			want(t, i, 1, 0, 1<<20)
			newer := r.take("newer") // not held up either
			put(t, d, 4, 0, 4096)
			close(release)
			if err := <-write; err != nil {
				t.Fatal(err)
			}
			want(t, i, 1, 0, 100)
			want(t, i, 2, 100, 1)
			want(t, i, 1, 101, 1<<20-101)
			want(t, image(t, newer, "d0"), 3, 0, 4096)
			want(t, d, 4, 0, 4096)
		})
	}
}

// TestWritersOfOneBlock holds a writer of a part of a block in the middle: one of
// another part waits for it, and neither loses what the other wrote.
func TestWritersOfOneBlock(t *testing.T) {
	r := newRig(t, 1, 1<<20, 16<<20)
	put(t, r.devs[0], 1, 0, 1<<20)
	i := image(t, r.takeWritable("s"), "d0")
	entered, release := stop(r.parts[0].hook, "write", 0)
	first := begin(func() error { return i.Write([]byte{2}, 10, false) })
	<-entered
	second := begin(func() error { return i.Write([]byte{3}, 20, false) })
	zero := begin(func() error { return i.Zero(30, 1) })
	stillWaits(t, second, "a second write to the block")
	stillWaits(t, zero, "zeroes in the block")
	close(release)
	if err := errors.Join(<-first, <-second, <-zero); err != nil {
		t.Fatal(err)
	}
	for off, v := range map[int64]byte{0: 1, 9: 1, 10: 2, 11: 1, 20: 3, 21: 1, 30: 0, 31: 1} {
		want(t, i, v, off, 1)
	}
}

// TestZeroWaitsForWriter holds a writer of one block of a chunk in the middle: what
// zeroes the whole chunk comes after it.
func TestZeroWaitsForWriter(t *testing.T) {
	r := newRig(t, 1, 1<<20, 16<<20)
	put(t, r.devs[0], 1, 0, 1<<20)
	i := image(t, r.takeWritable("s"), "d0")
	entered, release := stop(r.parts[0].hook, "write", 0)
	write := begin(func() error { return i.Write([]byte{2}, 10, false) })
	<-entered
	zero := begin(func() error { return i.Zero(0, chunkSize) })
	stillWaits(t, zero, "zeroes in the chunk")
	close(release)
	if err := errors.Join(<-write, <-zero); err != nil {
		t.Fatal(err)
	}
	want(t, i, 0, 0, chunkSize)
	want(t, i, 1, chunkSize, chunkSize)
}

// TestSlotOfOverlayUnderReader takes the slot away that a reader of the image is
// reading from: it is not given back before the reader is done.
func TestSlotOfOverlayUnderReader(t *testing.T) {
	for _, tc := range []struct {
		name string
		take func(s *Snapshot, i *Image) error
		want error // what the reader gets
		v    byte
		used int64
	}{
		{"zero", func(_ *Snapshot, i *Image) error { return i.Zero(0, chunkSize) }, nil, 0, 0},
		{"trim", func(_ *Snapshot, i *Image) error { return i.Trim(0, chunkSize, false) }, nil, 0, 0},
		{"move", func(_ *Snapshot, i *Image) error { return i.Write([]byte{2}, chunkSize-1, false) }, nil, 2, chunkSize},
		{"destroy", func(s *Snapshot, i *Image) error { return begunDestroy(s, i) }, ErrDestroyed, 0, 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := newRig(t, 1, 1<<20, 16<<20)
			r.addPart(16 << 20)
			d := r.devs[0]
			put(t, d, 1, 0, 1<<20)
			s := r.takeWritable("s")
			i := image(t, s, "d0")
			put(t, i, 2, 0, chunkSize)
			entered, release := stop(func(f func(string, int64, int64) error) {
				r.parts[0].hook(func(op string, off, n int64) error {
					if op == "write" {
						return errIO // who writes must move
					}
					return f(op, off, n)
				})
			}, "read", 0)
			got := make([]byte, chunkSize)
			read := begin(func() error { return i.Read(got, 0) })
			<-entered
			_, before, _ := r.pool.Space()
			if err := tc.take(s, i); err != nil {
				t.Error(err)
			}
			settled := begin(func() error { d.settle(time.Minute); return nil })
			stillWaits(t, settled, "giving back a slot that is being read")
			if _, after, _ := r.pool.Space(); after < before+tc.used {
				t.Errorf("space in use went from %d to %d while a reader was inside", before, after)
			}
			close(release)
			if err := <-read; !errors.Is(err, tc.want) {
				t.Errorf("the reader: got %v, want %v", err, tc.want)
			} else if err == nil && got[0] != tc.v {
				t.Errorf("a read that looked again: got %d, want %d", got[0], tc.v)
			}
			<-settled
			if _, after, _ := r.pool.Space(); after != tc.used {
				t.Errorf("%d bytes are in use in the end, want %d", after, tc.used)
			}
		})
	}
}

// begunDestroy destroys a snapshot whose image somebody is inside, without waiting
// for what comes back.
func begunDestroy(s *Snapshot, i *Image) error {
	go s.Destroy(true)
	<-i.Gone()
	return nil
}

// TestDestroyUnderImageWriter destroys the snapshot, or loses the image, while a
// write to it is in the middle: the write fails, and what it took comes back.
func TestDestroyUnderImageWriter(t *testing.T) {
	for _, tc := range []struct {
		name string
		end  func(t *testing.T, s *Snapshot, i *Image)
		want error
	}{
		{"destroyed", func(t *testing.T, s *Snapshot, i *Image) { begunDestroy(s, i) }, syscall.ESHUTDOWN},
		{"lost", func(t *testing.T, s *Snapshot, i *Image) { i.device.breakImage(i, overflowed, errIO) }, syscall.EIO},
	} {
		for _, op := range []string{"write", "read"} {
			t.Run(tc.name+" at "+op, func(t *testing.T) {
				r := newRig(t, 1, 1<<20, 16<<20)
				put(t, r.devs[0], 1, 0, 1<<20)
				s := r.takeWritable("s")
				i := image(t, s, "d0")
				put(t, i, 2, 0, 300)
				entered, release := stop(r.parts[0].hook, op, 0)
				write := begin(func() error { return i.Write(make([]byte, 5000), 200, false) })
				<-entered
				tc.end(t, s, i)
				settled := begin(func() error { i.device.settle(time.Minute); return nil })
				stillWaits(t, settled, "giving back what is being written")
				close(release)
				if err := <-write; !errors.Is(err, tc.want) {
					t.Errorf("the write: got %v, want %v", err, tc.want)
				}
				if got := r.used(); got != 0 {
					t.Errorf("%d bytes are in use in the end", got)
				}
			})
		}
	}
}

// TestTakeDuringImageWrite takes a snapshot after a write to an older image marked
// its range, but before it wrote: the new snapshot's map has the mark.
func TestTakeDuringImageWrite(t *testing.T) {
	r := newRig(t, 1, 1<<20, 16<<20)
	d := r.devs[0]
	put(t, d, 1, 0, 1<<20)
	i := image(t, r.takeWritable("s"), "d0")
	number := i.Changes().Number()
	entered, release := stop(r.parts[0].hook, "write", 0)
	write := begin(func() error { return i.Write(make([]byte, 4096), 64<<10, false) })
	<-entered
	newer := image(t, r.take("newer"), "d0")
	close(release)
	if err := <-write; err != nil {
		t.Fatal(err)
	}
	runs, _ := newer.Changes().Since(number)
	wantList(t, "from the image to the newer one", list(t, runs), "16+16 data")
}

// TestImageWriteWaitsForTake has a write to an image come while a snapshot is being
// taken: the mark must not fall between the new snapshot's map and the list of
// snapshots.
func TestImageWriteWaitsForTake(t *testing.T) {
	r := newRig(t, 1, 1<<20, 16<<20)
	d := r.devs[0]
	put(t, d, 1, 0, 1<<20)
	i := image(t, r.takeWritable("s"), "d0")
	number := i.Changes().Number()
	entered, release := stop(r.disks[0].hook, "write", 512<<10)
	live := begin(func() error { return d.Write([]byte{1}, 512<<10, false) })
	<-entered
	var newer *Snapshot
	take := begin(func() (err error) {
		newer, err = r.cat.Take("newer", r.devs, TakeOptions{Limit: time.Minute})
		return err
	})
	for {
		if p, ok := d.writers.tryEnter(); ok { // not shut yet
			d.writers.leave(p)
			continue
		}
		break
	}
	write := begin(func() error { return i.Write(make([]byte, 4096), 64<<10, false) })
	stillWaits(t, write, "a write to an image while a snapshot is being taken")
	close(release)
	if err := errors.Join(<-live, <-take, <-write); err != nil {
		t.Fatal(err)
	}
	runs, _ := image(t, newer, "d0").Changes().Since(number)
	wantList(t, "from the image to the newer one", list(t, runs), "16+16 data", "128+16 data")
}

// TestImageWriteWaitsForWhatComesBack has an image give space back that a reader
// still keeps from coming back, in a store that is full otherwise: the next write
// waits for it.
func TestImageWriteWaitsForWhatComesBack(t *testing.T) {
	r := newRig(t, 1, 8<<20, 1<<20)
	put(t, r.devs[0], 1, 0, 8<<20)
	i := image(t, r.takeWritable("s"), "d0")
	for off := int64(0); i.Write(make([]byte, chunkSize), off, false) == nil; off += chunkSize {
	}
	entered, release := stop(r.parts[0].hook, "read", 0)
	read := begin(func() error { return i.Read(make([]byte, 1), 0) })
	<-entered
	if err := i.Trim(0, chunkSize, false); err != nil {
		t.Error(err)
	}
	write := begin(func() error { return i.Write(make([]byte, chunkSize), 4<<20, false) })
	stillWaits(t, write, "a write that space comes back for")
	close(release)
	if err := errors.Join(<-read, <-write); err != nil {
		t.Error(err)
	}
}

package store

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestFailedPart: a part that fails gives out nothing more, what it holds can
// still be read, and the other part goes on.
func TestFailedPart(t *testing.T) {
	for _, op := range []string{"read", "write", "punch", "avail"} {
		t.Run(op, func(t *testing.T) {
			f := newFaulty(t, 4<<20)
			p := openPool(t, f, openMem(t, 4<<20))
			b := []byte("content")
			kept, gone := allocOne(t, p, 1), allocOne(t, p, 1)
			if err := p.WriteAt(kept, b, 0); err != nil {
				t.Fatal(err)
			}
			f.set(failing(op, unix.EIO))
			switch op {
			case "read":
				if err := p.ReadAt(kept, make([]byte, 7), 0); !errors.Is(err, unix.EIO) {
					t.Errorf("ReadAt\n got %v\nwant %v", err, unix.EIO)
				}
			case "write":
				if err := p.WriteAt(gone, b, 0); !errors.Is(err, unix.EIO) {
					t.Errorf("WriteAt\n got %v\nwant %v", err, unix.EIO)
				}
			case "punch":
				p.Free(gone, 1)
				if err := p.Discard(); !errors.Is(err, unix.EIO) {
					t.Errorf("Discard\n got %v\nwant %v", err, unix.EIO)
				}
			case "avail":
				p.survey(p.ledgers[0])
			}
			f.set(nil)
			if got, want := p.Parts()[0].State, "failed: "+unix.EIO.Error(); got != want {
				t.Errorf("state\n got %s\nwant %s", got, want)
			}
			if s := allocOne(t, p, 1); s.Part() != 2 {
				t.Errorf("slot beside a failed part\n got %v\nwant one of part 2", s)
			}
			if err := p.Extend(kept, 2); !errors.Is(err, ErrFull) {
				t.Errorf("Extend in a failed part\n got %v\nwant %v", err, ErrFull)
			}
			got := make([]byte, 7)
			if err := p.ReadAt(kept, got, 0); err != nil || string(got) != string(b) {
				t.Errorf("what the failed part holds\n got %q, %v\nwant %q", got, err, b)
			}
			if _, used, free := p.Space(); free != 4<<20-4096 || used < 8192 {
				t.Errorf("space\n got %d used, %d free\nwant only the other part's free", used, free)
			}
			p.Free(kept, 1)
		})
	}
}

// TestFullFileSystem: the file system has less room than the limit says.
func TestFullFileSystem(t *testing.T) {
	f, second := newFaulty(t, 64<<20), openMem(t, 64<<20)
	p := openPool(t, f, second)
	for range 100 {
		allocOne(t, p, AllBlocks)
	}
	last := allocOne(t, p, AllBlocks)
	f.avail.Store(0)
	f.set(failing("write", unix.ENOSPC))
	if err := p.WriteAt(last, make([]byte, SlotSize), 0); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("WriteAt\n got %v\nwant %v", err, syscall.ENOSPC)
	}
	p.Free(last, AllBlocks)
	if info := p.Parts()[0]; info.Free != 0 || info.State != "ok" || info.Limit != 64<<20 {
		t.Errorf("part without backing\n got %+v\nwant nothing free, and ok", info)
	}
	if s := allocOne(t, p, 1); s.Part() != 2 {
		t.Errorf("slot beside a full part\n got %v\nwant one of part 2", s)
	}
	if _, used, free := p.Space(); used != 100*SlotSize+4096 || free != 64<<20-4096 {
		t.Errorf("space\n got %d used, %d free\nwant %d used, %d free", used, free, 100*SlotSize+4096, 64<<20-4096)
	}
	f.set(nil)
	since := p.Freed()
	f.avail.Store(1 << 40)
	p.survey(p.ledgers[0])
	if p.Freed() == since {
		t.Errorf("nobody is told that there is room again")
	}
	if s := allocOne(t, p, 1); s.Part() != 1 {
		t.Errorf("slot when there is room again\n got %v\nwant one of part 1", s)
	}
}

// TestFreedBackingIsFound: a part without backing is looked at again as soon as
// something of it was freed, not only when its turn comes.
func TestFreedBackingIsFound(t *testing.T) {
	f := newFaulty(t, 64<<20)
	p := openPool(t, f)
	used, last := allocOne(t, p, 0x00ff), allocOne(t, p, 1)
	f.avail.Store(0)
	f.set(failing("write", unix.ENOSPC))
	if err := p.WriteAt(last, make([]byte, BlockSize), 0); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("WriteAt\n got %v\nwant %v", err, syscall.ENOSPC)
	}
	p.Free(used, 0x00ff)
	f.avail.Store(8 * BlockSize)
	p.tend(p.ledgers[0], false)
	if _, err := p.AllocReserve(make([]Slot, 1), []uint16{0x000f}); err != nil {
		t.Errorf("AllocReserve of what was freed: %v", err)
	}
}

// TestFullFileSystemGivesUpSpare: before a write fails for want of backing, what
// waits to be used again is given up.
func TestFullFileSystemGivesUpSpare(t *testing.T) {
	f := newFaulty(t, 64<<20)
	p := openPool(t, f)
	freed, s := allocOne(t, p, AllBlocks), allocOne(t, p, AllBlocks)
	p.Free(freed, AllBlocks)
	var punched atomic.Bool
	f.set(func(op string, off, n int64) error {
		switch {
		case op == "punch":
			punched.Store(true)
		case op == "write" && !punched.Load():
			return unix.ENOSPC
		}
		return nil
	})
	if err := p.WriteAt(s, make([]byte, SlotSize), 0); err != nil {
		t.Errorf("WriteAt with spare slots beside: %v", err)
	}
	f.set(nil)
}

// TestFullFileSystems fills real file systems through a sparse file, frees and
// fills them again. What was written must be there, and space must come back.
func TestFullFileSystems(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	for _, kind := range []string{"tmpfs", "ext4", "xfs", "btrfs"} {
		t.Run(kind, func(t *testing.T) {
			dir := mountTmpfs(t, "24m")
			if kind != "tmpfs" {
				dir = mountDisk(t, kind)
			}
			path := filepath.Join(dir, "store")
			p := openPool(t, openFile(t, path, 1<<40))
			for round := range 3 {
				slots := fill(t, p, round)
				_, _, free := p.Space()
				var st unix.Statfs_t
				if err := unix.Statfs(dir, &st); err != nil {
					t.Fatal(err)
				}
				t.Logf("round %d: %d slots, %d bytes free, %d in the file system", round, len(slots), free, int64(st.Bavail)*st.Bsize)
				if len(slots) < 100 {
					t.Errorf("round %d: slots before it was full\n got %d\nwant 100 at least", round, len(slots))
				}
				b := make([]byte, SlotSize)
				for i, s := range slots {
					if err := p.ReadAt(s, b, 0); err != nil || b[0] != byte(i) || b[SlotSize-1] != byte(i) {
						t.Fatalf("round %d: slot %d of %d: %v, byte %d", round, i, len(slots), err, b[0])
					}
					p.Free(s, AllBlocks)
				}
				if err := p.Discard(); err != nil {
					t.Fatal(err)
				}
				if got := backingOf(t, path); got > 128<<10 {
					t.Errorf("round %d: bytes on disk when empty\n got %d\nwant next to none", round, got)
				}
			}
		})
	}
}

// fill allocates and writes slots until neither works.
func fill(t *testing.T, p *Pool, round int) (slots []Slot) {
	t.Helper()
	b := make([]byte, SlotSize)
	for {
		dst := make([]Slot, 1)
		if _, err := p.Alloc(dst, []uint16{AllBlocks}); err != nil {
			if !errors.Is(err, ErrFull) {
				t.Fatalf("round %d: Alloc: %v", round, err)
			}
			return slots
		}
		for i := range b {
			b[i] = byte(len(slots))
		}
		if err := p.WriteAt(dst[0], b, 0); err != nil {
			if !errors.Is(err, syscall.ENOSPC) {
				t.Fatalf("round %d: WriteAt: %v", round, err)
			}
			p.Free(dst[0], AllBlocks)
			return slots
		}
		slots = append(slots, dst[0])
	}
}

// mountDisk mounts a small file system of its own, for use in a namespace, in
// which 24 MiB are left.
func mountDisk(t testing.TB, kind string) string {
	t.Helper()
	file, dir := sparseFile(t, t.TempDir(), 320<<20), t.TempDir()
	run(t, "mkfs."+kind, "-q", file)
	if err := unix.Mount(loopDevice(t, file), dir, kind, 0, ""); err != nil {
		t.Fatalf("mount %s: %v", kind, err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	ballast, err := os.Create(filepath.Join(dir, "ballast"))
	if err != nil {
		t.Fatal(err)
	}
	defer ballast.Close()
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(ballast.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	if err := unix.Fallocate(int(ballast.Fd()), 0, 0, int64(st.Bavail)*st.Bsize-24<<20); err != nil {
		t.Fatal(err)
	}
	return dir
}

// TestNobodyUsesWhatIsPunched holds a punch and sees that the block that is
// being punched is given to nobody, in any way, and that nobody waits for it.
func TestNobodyUsesWhatIsPunched(t *testing.T) {
	for _, tc := range []struct {
		name  string
		slots int64 // that the part has
		mask  uint16
	}{
		{"two blocks", 1024, 0b11},
		{"a whole slot", 1024, AllBlocks},
		{"the last slot", 1, AllBlocks},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := newFaulty(t, 4<<20)
			f.traits.Slots = tc.slots
			p := openPool(t, f)
			slot := []Slot{NoSlot}
			if _, err := p.AllocReserve(slot, []uint16{tc.mask}); err != nil {
				t.Fatal(err)
			}
			s := slot[0]
			p.Shrink(s, 0b10)
			hook, entered, release := gate("punch")
			f.set(hook)
			done := make(chan error)
			go func() { done <- p.Discard() }()
			<-entered
			if err := p.ExtendReserve(s, 0b10); !errors.Is(err, ErrFull) {
				t.Errorf("Extend by a block that is being punched\n got %v\nwant %v", err, ErrFull)
			}
			if err := p.ExtendReserve(s, AllBlocks&^0b10); err != nil {
				t.Errorf("Extend by the other blocks: %v", err)
			}
			p.Free(s, AllBlocks&^0b10)
			if n, _ := p.AllocReserve(slot, []uint16{AllBlocks}); n > 0 && slot[0] == s {
				t.Errorf("slot %v was given out while it was punched", s)
			}
			close(release)
			if err := <-done; err != nil {
				t.Fatal(err)
			}
		})
	}
}

// TestAllocWaitsForPunch: where nothing else is left, slots that are being
// punched are worth waiting for, but not for ever, and not by everybody.
func TestAllocWaitsForPunch(t *testing.T) {
	f := newFaulty(t, 4<<20)
	f.traits.Coarse, f.traits.Slots = true, 1
	p := openPool(t, f)
	slot, masks := []Slot{NoSlot}, []uint16{1}
	for _, late := range []bool{false, true} {
		if _, err := p.AllocReserve(slot, masks); err != nil {
			t.Fatal(err)
		}
		p.Free(slot[0], 1)
		hook, entered, release := gate("punch")
		f.set(hook)
		discarded := make(chan error)
		go func() { discarded <- p.Discard() }()
		<-entered
		if late {
			if _, err := p.AllocReserve(slot, masks); !errors.Is(err, ErrFull) {
				t.Errorf("AllocReserve beside a punch that hangs\n got %v\nwant %v", err, ErrFull)
			}
			if _, _, err := p.tryAlloc(slot, masks, true); !errors.Is(err, ErrFull) {
				t.Errorf("the next one\n got %v\nwant %v at once", err, ErrFull)
			}
			close(release)
		} else {
			since := p.Freed()
			allocated := make(chan error)
			go func() {
				_, err := p.AllocReserve(slot, masks)
				allocated <- err
			}()
			eventually(t, "somebody waits", func() bool {
				p.mu.Lock()
				defer p.mu.Unlock()
				return p.wake != nil && p.freed == since
			})
			close(release)
			if err := <-allocated; err != nil {
				t.Errorf("AllocReserve beside a punch: %v", err)
			}
			p.Free(slot[0], 1)
		}
		if err := <-discarded; err != nil {
			t.Fatal(err)
		}
	}
}

// TestDiscardLeavesSome: slots that are being discarded are out of reach for a
// moment, but never all that a device has.
func TestDiscardLeavesSome(t *testing.T) {
	f := newFaulty(t, 8*SlotSize)
	f.traits.Coarse, f.traits.Slots = true, 8
	p := openPool(t, f)
	s := allocOne(t, p, 1)
	for _, other := range alloc(t, p, repeat(5, 1)...) {
		p.Free(other, 1)
	}
	hook, entered, release := gate("punch")
	f.set(hook)
	done := make(chan error)
	go func() { done <- p.Discard() }()
	<-entered
	for n := range 4 {
		if len(alloc1(p, 1)) == 0 {
			t.Fatalf("slots while some are discarded, of seven and a reserve of two\n got %d\nwant 4", n)
		}
	}
	close(release)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	p.Free(s, 1)
}

// TestHangingPart: a part in which a write hangs is left alone until that ends,
// and Close goes on without a part that hangs.
func TestHangingPart(t *testing.T) {
	f := newFaulty(t, 4<<20)
	p := NewPool(f, openMem(t, 4<<20))
	s := allocOne(t, p, AllBlocks)
	hook, entered, release := gate("write")
	f.set(hook)
	wrote := make(chan error)
	go func() { wrote <- p.WriteAt(s, make([]byte, SlotSize), 0) }()
	<-entered
	p.Quarantine(s)
	if got := allocOne(t, p, AllBlocks); got.Part() != 2 {
		t.Errorf("slot beside a part that hangs\n got %v\nwant one of part 2", got)
	}
	if got, want := p.Parts()[0].State, "failed: it hangs"; got != want {
		t.Errorf("state of a part that hangs\n got %s\nwant %s", got, want)
	}
	if err := p.Check(); err != nil {
		t.Error(err)
	}
	close(release)
	<-wrote
	since := p.Freed()
	p.survey(p.ledgers[0])
	if p.Freed() == since {
		t.Errorf("nobody is told that the part works again")
	}
	since = p.Freed()
	if p.survey(p.ledgers[0]); p.Freed() != since {
		t.Errorf("it is told over and over that the part works again")
	}
	if got := allocOne(t, p, AllBlocks); got == s || got.Part() != 1 {
		t.Errorf("slot when the part works again\n got %v\nwant another than %v of part 1", got, s)
	}
	closing, entered, release2 := gate("close")
	f.set(closing)
	p.closeWait = 500 * time.Millisecond
	err := p.Close()
	if want := "close snapstore mem:4MiB: it hangs"; err == nil || err.Error() != want {
		t.Errorf("Close\n got %v\nwant %s", err, want)
	}
	<-entered
	close(release2)
}

// TestCloseWaitsForTheKeeper: a part is not closed under somebody's hands.
func TestCloseWaitsForTheKeeper(t *testing.T) {
	f := newFaulty(t, 4<<20)
	p := NewPool(f)
	hook, entered, release := gate("avail")
	closing := make(chan struct{})
	f.set(func(op string, off, n int64) error {
		if op == "close" {
			close(closing)
		}
		return hook(op, off, n)
	})
	<-entered
	done := make(chan error)
	go func() { done <- p.Close() }()
	select {
	case <-closing:
		t.Errorf("the part was closed while its keeper used it")
	case <-time.After(50 * time.Millisecond):
	}
	close(release)
	if err := <-done; err != nil {
		t.Errorf("Close: %v", err)
	}
}

// TestManyAtOnce uses a pool from several goroutines, whose parts are added,
// listed and checked meanwhile.
func TestManyAtOnce(t *testing.T) {
	p := openPool(t, openMem(t, 2<<20), openFile(t, filepath.Join(t.TempDir(), "store"), 8<<20))
	var owner sync.Map
	var workers, watchers sync.WaitGroup
	for g := range 4 {
		workers.Go(func() {
			mine := make(map[Slot]uint16)
			b := []byte(strings.Repeat(fmt.Sprint(g), BlockSize))
			for i := range 3000 {
				mask := [...]uint16{AllBlocks, 1, 0x00f0, 1 << 15}[(i+g)%4]
				for _, s := range alloc1(p, mask) {
					if who, taken := owner.LoadOrStore(s, g); taken {
						t.Errorf("slot %v was given to %d and to %v", s, g, who)
					}
					mine[s] = mask
					if err := p.WriteAt(s, b, int64(firstBlock(mask))*BlockSize); err != nil {
						t.Errorf("WriteAt: %v", err)
					}
				}
				for s, mask := range mine {
					if len(mine) < 20 {
						break
					}
					got := make([]byte, BlockSize)
					if err := p.ReadAt(s, got, int64(firstBlock(mask))*BlockSize); err != nil || string(got) != string(b) {
						t.Errorf("slot %v of %d: %v, or bytes of another", s, g, err)
					}
					owner.Delete(s)
					p.Free(s, mask)
					delete(mine, s)
				}
			}
			for s, mask := range mine {
				owner.Delete(s)
				p.Free(s, mask)
			}
		})
	}
	done := make(chan struct{})
	watchers.Go(func() {
		for {
			select {
			case <-done:
				return
			default:
			}
			p.Parts()
			p.Space()
			p.Outlook()
			for range p.InUse() {
			}
			if err := p.Check(); err != nil {
				t.Error(err)
				return
			}
			if err := p.Discard(); err != nil {
				t.Error(err)
				return
			}
		}
	})
	if err := p.Add(openMem(t, 1<<20)); err != nil {
		t.Error(err)
	}
	workers.Wait()
	close(done)
	watchers.Wait()
	wantSpace(t, p, "at the end", 0, 11<<20)
}

package store

import (
	"errors"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

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

// TestPunchedBackingShowsLate: a file system that is slow to show what was
// punched does not make the part smaller, but what others take does.
func TestPunchedBackingShowsLate(t *testing.T) {
	f := newFaulty(t, 64<<20)
	p := openPool(t, f)
	l := p.ledgers[0]
	slots := alloc(t, p, repeat(100, AllBlocks)...)
	f.avail.Store(0)
	f.set(failing("write", unix.ENOSPC))
	if err := p.WriteAt(slots[99], make([]byte, SlotSize), 0); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("WriteAt\n got %v\nwant %v", err, syscall.ENOSPC)
	}
	f.set(nil)
	for _, s := range slots {
		p.Free(s, AllBlocks)
	}
	if err := p.Discard(); err != nil {
		t.Fatal(err)
	}
	p.survey(l)
	wantSpace(t, p, "when all was punched", 0, 99*SlotSize)
	p.mu.Lock()
	l.backing.punched = time.Now().Add(-2 * showLag)
	p.mu.Unlock()
	p.survey(l)
	wantSpace(t, p, "when that should have shown", 0, 0)
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

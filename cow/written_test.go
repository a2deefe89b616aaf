package cow

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// changeBehind does something to a block device that is open elsewhere, too, so that what
// was written stays in memory.
var changeBehind = map[string]struct {
	do  func(f *os.File) error
	why string
}{
	"nothing": {func(*os.File) error { return nil }, ""},
	"read": {func(f *os.File) error {
		_, err := f.ReadAt(make([]byte, 64<<10), 1<<20)
		return err
	}, ""},
	"write": {func(f *os.File) error {
		_, err := f.WriteAt([]byte("x"), 1<<20)
		return err
	}, "the origin was written behind our back: "},
	"the same bytes": {func(f *os.File) error {
		p := make([]byte, blockSize)
		if _, err := f.ReadAt(p, 0); err != nil {
			return err
		}
		_, err := f.WriteAt(p, 0)
		return err
	}, "the origin was written behind our back: "},
	"discard": {func(f *os.File) error {
		return unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 1<<20, 64<<10)
	}, "the origin was written behind our back: "},
}

// TestBlockDeviceWrittenByOthers has somebody use a block device while its device is
// closed, or was killed a while after its last write, in the same boot.
func TestBlockDeviceWrittenByOthers(t *testing.T) {
	for _, killed := range []bool{false, true} {
		for name, tc := range changeBehind {
			if killed {
				name += ", killed"
			}
			t.Run(name, func(t *testing.T) {
				h := newHome(t, 4<<20)
				origin := filepath.Join(h.dir, "vda")
				backing := filepath.Join(t.TempDir(), "backing")
				if err := os.Rename(origin, backing); err != nil {
					t.Fatal(err)
				}
				loop := newLoop(t, backing)
				if err := os.Symlink(loop, origin); err != nil {
					t.Fatal(err)
				}
				h.open()
				put(t, h.dev, 1, 0, 2<<20)
				s := h.take("s")
				put(t, h.dev, 2, 0, chunkSize)
				want := make([]byte, 4<<20)
				if err := image(t, s, "vda").Read(want, 0); err != nil {
					t.Fatal(err)
				}
				was := h.dev.Changes().Generation()
				next := h
				if killed {
					h.dev.tally() // as soon as the device is idle for long enough
					next = h.afterKill()
				}
				h.close()
				h = next

				f, err := os.OpenFile(loop, os.O_RDWR, 0)
				if err != nil {
					t.Fatal(err)
				}
				defer f.Close()
				if err := tc.do(f); err != nil {
					t.Fatal(err)
				}
				snaps := h.open()
				defer h.close()
				i := image(t, snaps["s"], "vda")
				kept := h.dev.Changes().Generation() == was
				if tc.why != "" {
					if kept || !strings.HasPrefix(i.State(), "failed: "+tc.why) || !strings.HasPrefix(h.dev.Tracking().Reason(), tc.why) {
						t.Errorf("the generation is kept: %v, because %q; the image is %s\nwant a new one, a failed image, and %s", kept, h.dev.Tracking().Reason(), i.State(), tc.why)
					}
					return
				}
				got := make([]byte, 4<<20)
				if err := i.Read(got, 0); !kept || err != nil || !bytes.Equal(got, want) {
					t.Errorf("nobody wrote: the generation is kept: %v, the image reads right: %v, %v", kept, bytes.Equal(got, want), err)
				}
			})
		}
	}
}

// afterKill is a copy of what a kill leaves now, but for the origin, which is the same.
func (h *home) afterKill() *home {
	h.t.Helper()
	next := &home{t: h.t, dir: h.t.TempDir(), size: h.size}
	copyTree(h.t, filepath.Join(h.dir, "run"), filepath.Join(next.dir, "run"))
	if err := copySparse(filepath.Join(h.dir, "store"), filepath.Join(next.dir, "store")); err != nil {
		h.t.Fatal(err)
	}
	path, err := filepath.EvalSymlinks(filepath.Join(h.dir, "vda"))
	if err == nil {
		err = os.Symlink(path, filepath.Join(next.dir, "vda"))
	}
	if err != nil {
		h.t.Fatal(err)
	}
	return next
}

// TestTally looks when the number of sectors written is noted, and that it goes before
// the next write.
func TestTally(t *testing.T) {
	inBubble(func(t *testing.T) {
		l := newPowerLife(t)
		l.block = true
		l.disks.counts.Store(true)
		l.keep()
		noted := func() uint64 { return wordAt(l.dev.leaseMemory.Bytes(), writtenAt).Load() }
		wantNoted := func(when string, want int64) {
			t.Helper()
			if got := noted(); got != uint64(want) {
				t.Errorf("%s\n got %d noted\nwant %d", when, got, want)
			}
		}
		wantNoted("before the first write", 1)
		for round := int64(1); round <= 2; round++ {
			looked := false
			look := func() {
				looked = true
				wantNoted("while a write is under way", 0)
			}
			l.disks.pause.Store(&look)
			l.put(0)
			l.disks.pause.Store(nil)
			if !looked {
				t.Error("nobody has looked")
			}
			wantNoted("after it", 0)
			time.Sleep(runLease + tallyAfter/2)
			wantNoted("while more may come", 0)
			time.Sleep(runLease + tallyAfter)
			wantNoted("when the device is idle", 8*round+1)
			time.Sleep(time.Hour)
			if l.dev.leaseTimer.Stop() {
				t.Error("a timer runs for a device that nobody writes to")
			}
		}
	})(t)
}

// TestTallyAgain has the disk not answer when it is asked to write everything: it is asked
// once more a minute later, and not all the time.
func TestTallyAgain(t *testing.T) {
	inBubble(func(t *testing.T) {
		l := newPowerLife(t)
		l.block = true
		l.disks.counts.Store(true)
		l.keep()
		l.put(0)
		l.disks.counts.Store(false)
		time.Sleep(runLease + 2*tallyAfter)
		l.disks.counts.Store(true)
		noted := func() bool { return wordAt(l.dev.leaseMemory.Bytes(), writtenAt).Load() != 0 }
		time.Sleep(tallyAgain / 2)
		if noted() {
			t.Error("it is asked again too soon")
		}
		time.Sleep(tallyAgain)
		if !noted() {
			t.Error("it is not asked again")
		}
	})(t)
}

// TestTallyOvertakenByWrite has a write come while the disk is asked to write everything.
func TestTallyOvertakenByWrite(t *testing.T) {
	l := newPowerLife(t)
	l.block = true
	l.disks.counts.Store(true)
	l.keep()
	l.put(0)
	until := l.dev.leased.Load()
	n := l.dev.countWritten()
	l.dev.leased.Store(0) // it has run out
	l.put(0)
	l.dev.noteWritten(n, until)
	if got := wordAt(l.dev.leaseMemory.Bytes(), writtenAt).Load(); got != 0 {
		t.Errorf("%d noted, which a write has overtaken", got)
	}
}

func TestSectorsIn(t *testing.T) {
	for _, tc := range []struct {
		name, stat string
		want       uint64
		ok         bool
	}{
		{"Linux 6", "  91  0  740  2  23  25  2436  3  0  12  8  3  0  16514  0  11  2\n", 2436 + 16514, true},
		{"Linux 4.17, without discards", "91 0 740 2 23 25 2436 3 0 12 8\n", 2436, true},
		{"cut short", "91 0 740 2 23 25", 0, false},
		{"empty", "", 0, false},
		{"no numbers", strings.Repeat("x ", 17), 0, false},
	} {
		if got, ok := sectorsIn(tc.stat); got != tc.want || ok != tc.ok {
			t.Errorf("%s: got %d, %v, want %d, %v", tc.name, got, ok, tc.want, tc.ok)
		}
	}
}

// loopHome is a home whose origin is a loop device, which it returns.
func loopHome(t *testing.T) (h *home, loop string) {
	t.Helper()
	h = newHome(t, 4<<20)
	origin, backing := filepath.Join(h.dir, "vda"), filepath.Join(t.TempDir(), "backing")
	if err := os.Rename(origin, backing); err != nil {
		t.Fatal(err)
	}
	loop = newLoop(t, backing)
	if err := os.Symlink(loop, origin); err != nil {
		t.Fatal(err)
	}
	return h, loop
}

// stubbornDisk is the host's file system, on which nobody can remove what is below a directory.
type stubbornDisk struct {
	hostDisk
	dir string
}

func (k stubbornDisk) remove(path string) error {
	if strings.HasPrefix(path, k.dir) {
		return syscall.EIO
	}
	return k.hostDisk.remove(path)
}

// busyDisk is an origin that does not say how much was written to it when it is asked for the
// fourth time: an open asks twice to compare, once whether it can, and then in the background.
type busyDisk struct {
	originFile
	calls *atomic.Int32
}

func (b busyDisk) written() (uint64, bool) {
	if b.calls.Add(1) == 4 {
		return 0, false
	}
	return b.originFile.written()
}

// TestWrittenAfterAnOpenFailed has somebody write to a block device which we had opened, and
// then not served: that is not our doing.
func TestWrittenAfterAnOpenFailed(t *testing.T) {
	h, loop := loopHome(t)
	h.state = t.TempDir()
	h.open()
	h.writeDown()
	h.take("s")
	was := h.dev.Changes().Generation()
	h.close()
	devices := filepath.Join(h.state, "devices")
	other := filepath.Join(devices, "other") // which was the same disk
	copyTree(t, filepath.Join(devices, "vda"), other)
	o, err := OpenOrigin(filepath.Join(h.dir, "vda"))
	if err != nil {
		t.Fatal(err)
	}
	asked := new(atomic.Int32)
	o.file = busyDisk{o.file, asked}
	cat := newCatalogue(t, filepath.Join(h.dir, "run"), h.state)
	cat.disk = stubbornDisk{dir: other}
	if _, err := cat.Open(o, h.pool, Config{Name: "vda"}); !errors.Is(err, syscall.EIO) {
		t.Fatalf("open where the other device's map stays: %v, want EIO", err)
	}
	if got := asked.Load(); got < 3 {
		t.Fatalf("the disk was asked %d times what was written", got)
	}
	if err := cat.Close(); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(loop, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte("x"), 2<<20); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Sync(), f.Close(), os.RemoveAll(other)); err != nil {
		t.Fatal(err)
	}
	i := image(t, h.open()["s"], "vda")
	defer h.close()
	const why = "the origin was written behind our back"
	if got := h.dev.Tracking(); got.Generation() == was || !strings.HasPrefix(got.Reason(), why) || !strings.HasPrefix(i.State(), "failed: "+why) {
		t.Errorf("the generation is kept: %v, because %q; the image is %s\nwant a new one, a failed image, and %s", got.Generation() == was, got.Reason(), i.State(), why)
	}
}

// slowDisk is an origin whose flushes wait while it is held.
type slowDisk struct {
	originFile
	held *atomic.Pointer[chan struct{}]
}

func (s slowDisk) sync(complete bool) error {
	if gate := s.held.Load(); gate != nil {
		<-*gate
	}
	return s.originFile.sync(complete)
}

// TestSlowFlushIsNobodysWrite opens a block device that does not answer a flush in time, as
// one that was spun down: nobody wrote to it.
func TestSlowFlushIsNobodysWrite(t *testing.T) {
	h, _ := loopHome(t)
	h.limit = time.Second
	var held atomic.Pointer[chan struct{}]
	h.wrap = func(f originFile) originFile { return slowDisk{f, &held} }
	h.open()
	put(t, h.dev, 1, 0, 2<<20)
	h.take("s")
	was := h.dev.Changes().Generation()
	h.close()
	gate := make(chan struct{})
	held.Store(&gate)
	snaps := h.open()
	if now, state := h.dev.Changes().Generation(), image(t, snaps["s"], "vda").State(); now != was || state != "ok" {
		t.Errorf("the generation is kept: %v, because %q; the image is %s", now == was, h.dev.Tracking().Reason(), state)
	}
	held.Store(nil)
	close(gate)
	h.close()
}

// slowCount is an origin of which the second count of what was written waits: the one that
// an open begins in the background.
type slowCount struct {
	originFile
	calls         *atomic.Int32
	entered, gate chan struct{}
}

func (s slowCount) written() (uint64, bool) {
	if s.calls.Add(1) == 2 {
		close(s.entered)
		<-s.gate
	}
	return s.originFile.written()
}

// TestCloseWaitsForTally closes a device while what was written to it is counted.
func TestCloseWaitsForTally(t *testing.T) {
	h, _ := loopHome(t)
	s := slowCount{calls: new(atomic.Int32), entered: make(chan struct{}), gate: make(chan struct{})}
	h.wrap = func(f originFile) originFile {
		s.originFile = f
		return s
	}
	h.open()
	<-s.entered
	closed := make(chan struct{})
	go func() {
		h.close()
		close(closed)
	}()
	select {
	case <-closed:
		t.Error("the device is closed, and somebody still counts")
	case <-time.After(50 * time.Millisecond):
	}
	close(s.gate)
	<-closed
}

// TestWrittenByOthersAndMapLost has somebody write to a block device whose change map in the
// run directory is lost as well: the one in the state directory does not hold it.
func TestWrittenByOthersAndMapLost(t *testing.T) {
	for _, foreign := range []bool{false, true} {
		h, loop := loopHome(t)
		h.state = filepath.Join(h.dir, "state")
		h.open()
		h.waitDurable()
		put(t, h.dev, 1, 0, 2<<20)
		was := h.dev.Changes().Generation()
		h.close()
		if foreign {
			f, err := os.OpenFile(loop, os.O_RDWR, 0)
			if err == nil {
				_, err = f.WriteAt([]byte("foreign"), 2<<20)
				err = errors.Join(err, f.Close())
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		if err := os.Truncate(h.layer("changes"), 0); err != nil {
			t.Fatal(err)
		}
		h.open()
		if kept := h.dev.Changes().Generation() == was; kept == foreign {
			t.Errorf("somebody wrote: %v; the generation is kept: %v, because %q", foreign, kept, h.dev.Tracking().Reason())
		}
		h.close()
	}
}

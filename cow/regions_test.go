package cow

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"

	"github.com/google/uuid"
)

// newTestRegions makes a record in a file of its own.
func newTestRegions(t *testing.T, size int64) (*regions, string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "regions")
	r, err := createRegions(hostDisk{}, path, regionsState{size: size, generation: uuid.New(), number: 7})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.file.Close() })
	return r, path
}

// recordedIn lists the regions that a start finds at path.
func recordedIn(t *testing.T, path string) []int64 {
	t.Helper()
	r, err := openRegions(hostDisk{}, path)
	if err != nil {
		t.Fatal(err)
	}
	defer r.file.Close()
	var list []int64
	for i := range r.n {
		if hasBit(r.recorded, i) {
			list = append(list, i)
		}
	}
	return list
}

func wantRegions(t *testing.T, path string, want ...int64) {
	t.Helper()
	got := recordedIn(t, path)
	if len(got) != len(want) {
		t.Errorf("recorded regions\n got %v\nwant %v", got, want)
		return
	}
	for i := range got {
		if got[i] != want[i] {
			t.Errorf("recorded regions\n got %v\nwant %v", got, want)
			return
		}
	}
}

const region = int64(1) << regionShift

func TestRegionsAreRecordedBeforeTheFirstWrite(t *testing.T) {
	r, path := newTestRegions(t, 10000*region+512)
	for _, tc := range []struct{ off, n int64 }{
		{0, 1}, {3*region - 1, 2}, {5000 * region, 1}, {10000 * region, 512},
	} {
		if r.note(tc.off, tc.n) {
			t.Errorf("region of %d counts as recorded", tc.off)
		}
		if err := r.add(tc.off, tc.n); err != nil {
			t.Fatal(err)
		}
		if !r.note(tc.off, tc.n) {
			t.Errorf("region of %d does not count as recorded", tc.off)
		}
	}
	wantRegions(t, path, 0, 2, 3, 5000, 10000)
}

func TestDropKeepsWhatIsActive(t *testing.T) {
	r, path := newTestRegions(t, 100*region)
	for i := range int64(4) {
		if err := r.add(i*region, 1); err != nil {
			t.Fatal(err)
		}
	}
	r.begin()
	r.note(1*region, 1)
	err := r.drop(r.state.generation, func() bool {
		// A writer that looked before the record shrank, and writes now.
		setBit(r.active, 2)
		if r.note(3*region, 1) {
			t.Error("a region that is being dropped counts as recorded")
		}
		// Somebody else does not wait for that writer, and takes nothing from it.
		if err := r.add(5*region, 1); err != nil {
			t.Error(err)
		}
		wantRegions(t, path, 0, 1, 2, 3, 5)
		return true
	})
	if err != nil {
		t.Fatal(err)
	}
	// Region 3 was asked for too late: its writer has to add it again.
	wantRegions(t, path, 1, 2, 3, 5)
	if r.note(0, 1) {
		t.Error("an idle region is still recorded")
	}
	// What was dropped comes back.
	if err := r.add(0, 1); err != nil {
		t.Fatal(err)
	}
	wantRegions(t, path, 0, 1, 2, 3, 5)
}

// TestStoppedDropDropsNothing stops a drop while it waits for writes in flight.
func TestStoppedDropDropsNothing(t *testing.T) {
	r, path := newTestRegions(t, 100*region)
	if err := r.add(0, 2*region); err != nil {
		t.Fatal(err)
	}
	r.begin()
	stopped := func() bool { return r.add(5*region, 1) != nil }
	if err := r.drop(r.state.generation, stopped); !errors.Is(err, ErrStopping) {
		t.Errorf("drop: %v, want ErrStopping", err)
	}
	if !r.note(0, 2*region) || !r.note(5*region, 1) {
		t.Error("what was recorded is not any more")
	}
	wantRegions(t, path, 0, 1, 5)
}

// TestUnsureRecordTakesNothing fails to write the header that says that the other set
// counts: on the disk it does not, so no region may count as recorded in it.
func TestUnsureRecordTakesNothing(t *testing.T) {
	r, path := newTestRegions(t, 100*region)
	if err := r.add(0, 1); err != nil {
		t.Fatal(err)
	}
	r.begin()
	r.note(0, 1)
	r.file = &failingHeader{r.file}
	if err := r.drop(r.state.generation, func() bool { return true }); !errors.Is(err, syscall.EIO) {
		t.Fatalf("drop over a header that cannot be written: %v, want EIO", err)
	}
	r.file = r.file.(*failingHeader).durableFile
	if err := r.add(5*region, 1); !errors.Is(err, syscall.EIO) || r.note(5*region, 1) {
		t.Errorf("a region that no start would find is recorded: %v, want EIO", err)
	}
	wantRegions(t, path, 0)
}

// failingHeader writes no header.
type failingHeader struct{ durableFile }

func (f *failingHeader) WriteAt(p []byte, off int64) (int, error) {
	if off < regionsSets {
		return 0, syscall.EIO
	}
	return f.durableFile.WriteAt(p, off)
}

func TestRegionsOfManyAreWrittenTogether(t *testing.T) {
	r, path := newTestRegions(t, 4000*region)
	f := &countingFile{durableFile: r.file, entered: make(chan struct{}), release: make(chan struct{})}
	r.file = f
	first := begin(func() error { return r.add(0, 1) })
	<-f.entered
	var others sync.WaitGroup
	for i := range int64(64) {
		others.Go(func() {
			if err := r.add((10+i)*region, 1); err != nil {
				t.Error(err)
			}
		})
	}
	for { // until all have joined
		r.joinMu.Lock()
		n := 0
		if r.next != nil {
			n = len(r.next.regions)
		}
		r.joinMu.Unlock()
		if n == 64 {
			break
		}
	}
	close(f.release)
	if err := <-first; err != nil {
		t.Fatal(err)
	}
	others.Wait()
	if f.syncs != 2 {
		t.Errorf("%d syncs for 65 regions, 64 of which came during the first: want 2", f.syncs)
	}
	if got := len(recordedIn(t, path)); got != 65 {
		t.Errorf("%d regions are recorded, want 65", got)
	}
}

// countingFile counts syncs and holds the first one up.
type countingFile struct {
	durableFile
	syncs            int
	entered, release chan struct{}
}

func (f *countingFile) Sync() error {
	f.syncs++
	if f.syncs == 1 {
		close(f.entered)
		<-f.release
	}
	return f.durableFile.Sync()
}

// TestDamagedRecord damages every byte of the record in turn: it is refused by
// name, or all that was recorded is still recorded.
func TestDamagedRecord(t *testing.T) {
	r, path := newTestRegions(t, 5000*region)
	add := func(i int64) {
		if err := r.add(i*region, 1); err != nil {
			t.Fatal(err)
		}
	}
	add(1)
	r.note(1*region, 1)
	// The other set counts from now on, and the first has not region 4999.
	if err := r.drop(r.state.generation, func() bool { return true }); err != nil {
		t.Fatal(err)
	}
	add(4999)
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for at := range good {
		bad := append([]byte(nil), good...)
		bad[at] ^= 0x10
		if err := os.WriteFile(path, bad, 0o600); err != nil {
			t.Fatal(err)
		}
		again, err := openRegions(hostDisk{}, path)
		if err != nil {
			if !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrVersion) {
				t.Fatalf("byte %d: got %v, want ErrDamaged or ErrVersion", at, err)
			}
			continue
		}
		for _, i := range []int64{1, 4999} {
			if !hasBit(again.recorded, i) {
				t.Fatalf("with byte %d changed, region %d is not recorded", at, i)
			}
		}
		again.file.Close()
	}
}

// TestHeaderThatIsGone opens a record of which the newer header cannot be read, or was
// zeroed: all that was recorded is still recorded, and no number comes again.
func TestHeaderThatIsGone(t *testing.T) {
	for _, unreadable := range []bool{true, false} {
		t.Run(fmt.Sprintf("unreadable %v", unreadable), func(t *testing.T) {
			r, path := newTestRegions(t, 2*region)
			// The other set counts from now on.
			if err := r.drop(r.state.generation, func() bool { return true }); err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(r.reserve(r.state.number+1), r.drop(r.state.generation, func() bool { return true }), r.add(region, 1)); err != nil {
				t.Fatal(err)
			}
			at := int64(r.state.seq%2) * regionsHeader
			file := r.file
			if unreadable {
				file = badSector{r.file, at}
			} else if _, err := r.file.WriteAt(zeroes[:regionsHeader], at); err != nil {
				t.Fatal(err)
			}
			again, err := readRegions(file)
			if err != nil {
				t.Fatal(err)
			}
			if !hasBit(again.recorded, 1) {
				t.Error("the region is not recorded any more")
			}
			if again.state.number < r.state.number {
				t.Errorf("number\n got %d\nwant %d or more", again.state.number, r.state.number)
			}
			if err := again.heal(); err != nil {
				t.Fatal(err)
			}
			wantRegions(t, path, 1)
		})
	}
}

// badSector is a file of which a header cannot be read.
type badSector struct {
	durableFile
	at int64
}

func (f badSector) ReadAt(p []byte, off int64) (int, error) {
	if off == f.at {
		return 0, syscall.EIO
	}
	return f.durableFile.ReadAt(p, off)
}

// TestHealedRecordIsWhole heals a record with a damaged header. A kill at any step of that
// loses no region and no number; and it is enough once, so that numbers do not leap with
// each start.
func TestHealedRecordIsWhole(t *testing.T) {
	r, path := newTestRegions(t, 5000*region)
	for _, i := range []int64{1, 4999} {
		if err := r.add(i*region, 1); err != nil {
			t.Fatal(err)
		}
		// The other set counts from now on, and keeps the region.
		r.begin()
		r.note(i*region, 1)
		if err := r.drop(r.state.generation, func() bool { return true }); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.add(2500*region, 1); err != nil {
		t.Fatal(err)
	}
	number := r.state.number
	if _, err := r.file.WriteAt([]byte{0xff}, int64(r.state.seq%2)*regionsHeader+20); err != nil {
		t.Fatal(err)
	}
	for k := 1; ; k++ {
		again, err := openRegions(hostDisk{}, path)
		if err != nil {
			t.Fatal(err)
		}
		if want := number + 2*reserveStep; again.state.number != want {
			t.Errorf("number after %d starts\n got %d\nwant %d", k, again.state.number, want)
		}
		again.file = &dyingFile{again.file, k}
		err = again.heal()
		if cerr := again.file.Close(); cerr != nil {
			t.Error(cerr)
		}
		wantRegions(t, path, 1, 2500, 4999)
		if err == nil && !again.halved {
			break
		}
		if !errors.Is(err, syscall.EIO) {
			t.Fatalf("healed over a file that fails: %v, want EIO", err)
		}
	}
	again, err := openRegions(hostDisk{}, path)
	if err != nil {
		t.Fatal(err)
	}
	defer again.file.Close()
	if again.halved || again.state.number != number+2*reserveStep {
		t.Errorf("after it was healed: a damaged header %v, number %d; want false, %d", again.halved, again.state.number, number+2*reserveStep)
	}
}

// dyingFile fails from its kth write on.
type dyingFile struct {
	durableFile
	k int
}

func (f *dyingFile) WriteAt(p []byte, off int64) (int, error) {
	if f.k--; f.k <= 0 {
		return 0, syscall.EIO
	}
	return f.durableFile.WriteAt(p, off)
}

func TestNumbersAreReserved(t *testing.T) {
	r, path := newTestRegions(t, region)
	if err := r.reserve(8); err != nil {
		t.Fatal(err)
	}
	again, err := openRegions(hostDisk{}, path)
	if err != nil {
		t.Fatal(err)
	}
	defer again.file.Close()
	if got := again.state.number; got < 8 {
		t.Errorf("reserved up to %d, want at least 8", got)
	}
	seq := r.state.seq
	if err := r.reserve(9); err != nil || r.state.seq != seq {
		t.Errorf("a number that is reserved already was written again (%v)", err)
	}
}

// TestRegionsEnd asks for regions beyond the end, as a write does that was let in
// before its device became smaller.
func TestRegionsEnd(t *testing.T) {
	r, err := createRegions(hostDisk{}, filepath.Join(t.TempDir(), "regions"), regionsState{size: 3<<regionShift + 512})
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range []int64{512, 200 << regionShift} {
		for _, off := range []int64{3 << regionShift, 4 << regionShift, 100 << regionShift} {
			if err := r.add(off, n); err != nil {
				t.Fatal(err)
			}
			if !r.note(off, n) {
				t.Errorf("[%d, %d) is not recorded", off, off+n)
			}
		}
	}
	if err := r.file.Close(); err != nil {
		t.Error(err)
	}
}

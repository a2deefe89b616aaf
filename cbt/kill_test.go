package cbt

import (
	"bufio"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"testing"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"
)

var kills = flag.Int("kills", 8, "how often TestKill kills the process")

// file is a Memory that outlives the process.
type file struct {
	fd    *os.File
	bytes []byte
	n     int64
}

// openFile maps the file at path, with limit bytes of address space.
func openFile(path string, limit int64) (*file, error) {
	fd, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	st, err := fd.Stat()
	if err != nil {
		return nil, err
	}
	b, err := unix.Mmap(int(fd.Fd()), 0, int(limit), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, err
	}
	return &file{fd: fd, bytes: b, n: st.Size()}, nil
}

func (f *file) Bytes() []byte { return f.bytes }
func (f *file) Len() int64    { return f.n }

func (f *file) Grow(n int64) error {
	n = (n + 1<<16 - 1) &^ (1<<16 - 1)
	if n > int64(len(f.bytes))-f.n {
		return fmt.Errorf("grow by %d: %w", n, unix.ENOSPC)
	}
	if err := unix.Fallocate(int(f.fd.Fd()), 0, f.n, n); err != nil {
		return err
	}
	if err := unix.Madvise(f.bytes[f.n:][:n], unix.MADV_POPULATE_WRITE); err != nil {
		return err
	}
	f.n += n
	return nil
}

func (f *file) Close() error {
	if err := unix.Munmap(f.bytes); err != nil {
		return err
	}
	return f.fd.Close()
}

const (
	killSize    = 64 * leafSpan
	killWriters = 3
	killKept    = 4 // frozen maps
)

// diary is where the killed process notes what it has done: a file that is
// mapped, too. Each of its pages belongs to one writer, or to the one who takes
// snapshots: a word that counts the notes, and the notes, three words each.
type diary struct {
	*file
	words
}

const (
	pageBytes   = 1 << 20
	noteBytes   = 24
	diaryBytes  = pageBytes * (killWriters + 1)
	snapshots   = killWriters // the page of the one who takes them
	diaryIsFull = (pageBytes - 8) / noteBytes
)

// add notes something that was done. It returns false if there is no room.
func (d *diary) add(page int, a, b, c uint64) bool {
	at := int64(page) * pageBytes
	n := d.load(at)
	if n == diaryIsFull {
		return false
	}
	off := at + 8 + int64(n)*noteBytes
	d.store(off, a)
	d.store(off+8, b)
	d.store(off+16, c)
	d.store(at, n+1)
	return true
}

// notes returns what was noted on a page.
func (d *diary) notes(page int) (all [][3]uint64) {
	at := int64(page) * pageBytes
	for off := at + 8; off < at+8+int64(d.load(at))*noteBytes; off += noteBytes {
		all = append(all, [3]uint64{d.load(off), d.load(off + 8), d.load(off + 16)})
	}
	return all
}

// turnOver makes room for what the next process notes.
func (d *diary) turnOver(frozen []*Frozen) {
	for page := range killWriters {
		if d.load(int64(page)*pageBytes) > diaryIsFull/2 {
			d.store(int64(page)*pageBytes, 0)
		}
	}
	d.store(snapshots*pageBytes, 0)
	for _, f := range frozen {
		d.add(snapshots, wasTaken, f.number, 0)
	}
}

// What the one who takes snapshots notes, with the number.
const (
	wasTaken = iota
	isReleased
)

// TestKill kills a process that marks, takes snapshots and releases them, at
// random moments, and lets the next one go on. Each finds all marks that were
// noted, in the live map and in the frozen maps that were taken after them, and
// exactly the frozen maps that were taken and not released.
func TestKill(t *testing.T) {
	rng := random(t)
	dir := t.TempDir()
	for i := range *kills {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			killOnce(t, rng, dir)
			checkKilled(t, dir)
		})
		if t.Failed() {
			return
		}
	}
}

// killOnce runs a process until it has noted some more.
func killOnce(t *testing.T, rng *rand.Rand, dir string) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "CBT_TEST_KILLED="+dir, fmt.Sprintf("CBT_TEST_SEED=%d", rng.Uint64()))
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	// The process says something after each snapshot.
	lines := bufio.NewScanner(out)
	for range rng.IntN(40) + 1 {
		if !lines.Scan() {
			t.Errorf("the process ended by itself: %v", lines.Err())
			break
		}
	}
	for range rng.IntN(100_000) {
		// A moment, at random.
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Errorf("kill: %v", err)
	}
	_, _ = io.Copy(io.Discard, out)
	if err := cmd.Wait(); cmd.ProcessState.Exited() {
		t.Errorf("the process was not killed: %v", err)
	}
}

// checkKilled compares what a killed process left behind with its notes.
func checkKilled(t *testing.T, dir string) {
	t.Helper()
	mem, d, err := openKilled(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(mem.Close(), d.Close()); err != nil {
			t.Error(err)
		}
	})
	m, frozen := openTestMap(t, mem)
	if m.Lost() {
		t.Fatal("the map is lost")
	}
	frozen = checkFrozen(t, d, frozen)
	v := m.View()
	defer v.Release()
	notes := 0
	for page := range killWriters {
		all := d.notes(page)
		notes += len(all)
		wantNoted(t, v, all, v.number+1)
		for _, f := range frozen {
			wantNoted(t, &f.View, all, f.number)
		}
	}
	t.Logf("number %d, base %d, %d frozen maps, %d notes", m.Number(), m.Base(), len(frozen), notes)
	d.turnOver(frozen)
}

// checkFrozen fails unless the frozen maps are those that were taken and not
// released, which it returns. It finishes what the killed process had begun.
func checkFrozen(t *testing.T, d *diary, frozen []*Frozen) (kept []*Frozen) {
	t.Helper()
	notes := d.notes(snapshots)
	wanted := make(map[uint64]bool)
	for _, n := range notes {
		wanted[n[1]] = n[0] == wasTaken
	}
	for _, f := range frozen {
		want, noted := wanted[f.number]
		delete(wanted, f.number)
		switch {
		case want || !noted:
			kept = append(kept, f)
		case f.number == notes[len(notes)-1][1]:
			f.Release()
		default:
			t.Errorf("frozen map %d was released", f.number)
		}
	}
	for number, want := range wanted {
		if want {
			t.Errorf("frozen map %d is missing", number)
		}
	}
	return kept
}

// wantNoted fails unless v has the noted marks with up to number.
func wantNoted(t *testing.T, v *View, notes [][3]uint64, number uint64) {
	t.Helper()
	bytes := make([]byte, v.Blocks())
	v.ReadMap(bytes, 0)
	for _, n := range notes {
		if n[2] > number || n[2] <= v.Base() {
			continue
		}
		for b := n[0]; b < n[1]; b++ {
			if got := v.Base() + uint64(bytes[b]); got < n[2] {
				t.Fatalf("map with marks up to %d: block %d has number %d, was marked with %d", number, b, got, n[2])
			}
		}
	}
}

// openKilled maps what processes that are killed share.
func openKilled(dir string) (*file, *diary, error) {
	mem, err := openFile(filepath.Join(dir, "map"), 64<<20)
	if err != nil {
		return nil, nil, err
	}
	d, err := openFile(filepath.Join(dir, "diary"), diaryBytes)
	if err != nil {
		return nil, nil, err
	}
	if d.n == 0 {
		err = d.Grow(diaryBytes)
	}
	return mem, &diary{file: d, words: newWords(d.bytes)}, err
}

// TestMain is main of the process that TestKill kills, where it is that.
func TestMain(m *testing.M) {
	if dir := os.Getenv("CBT_TEST_KILLED"); dir != "" {
		seed, _ := strconv.ParseUint(os.Getenv("CBT_TEST_SEED"), 10, 64)
		fmt.Fprintln(os.Stderr, runKilled(dir, rand.New(rand.NewPCG(seed, 0))))
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// runKilled marks, takes snapshots and releases them until it is killed. It
// prints each snapshot's number.
func runKilled(dir string, rng *rand.Rand) error {
	mem, d, err := openKilled(dir)
	if err != nil {
		return err
	}
	m, frozen, err := Open(mem)
	if mem.Len() == 0 {
		m, err = New(mem, killSize, block, uuid.New(), 0)
	}
	if err != nil {
		return err
	}
	m.limit = 30
	var gate sync.RWMutex
	busy := make(chan struct{}) // some more was marked
	for page := range killWriters {
		rng := rand.New(rand.NewPCG(rng.Uint64(), uint64(page)))
		go func() {
			for i := 1; ; i++ {
				if i%64 == 0 {
					busy <- struct{}{}
				}
				off := rng.Int64N(killSize)
				n := min(rng.Int64N(256<<10)+1, killSize-off)
				gate.RLock()
				number := m.Number() + 1
				m.Mark(off, n)
				d.add(page, uint64(off>>minShift), uint64(blocksOf(off+n, minShift)), number)
				gate.RUnlock()
			}
		}()
	}
	for range busy {
		if err := m.Prepare(); err != nil {
			return err
		}
		gate.Lock()
		f, err := m.Freeze()
		gate.Unlock()
		if err != nil {
			return err
		}
		d.add(snapshots, wasTaken, f.number, 0)
		for frozen = append(frozen, f); len(frozen) > killKept; {
			i := rng.IntN(len(frozen))
			d.add(snapshots, isReleased, frozen[i].number, 0)
			frozen[i].Release()
			frozen = slices.Delete(frozen, i, i+1)
		}
		fmt.Println(f.number)
	}
	return nil
}

// What QEMU says about the files.

package qcow2

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
)

// qemu runs qemu-img or qemu-io in dir, which must succeed.
func qemu(t *testing.T, dir, program string, args ...string) string {
	t.Helper()
	out, err := tryQEMU(t, dir, program, args...)
	if err != nil {
		t.Fatalf("%s %v: %v\n%s", program, args, err, out)
	}
	return out
}

// tryQEMU is qemu for what may fail.
func tryQEMU(t *testing.T, dir, program string, args ...string) (string, error) {
	t.Helper()
	if _, err := exec.LookPath(program); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
	cmd := exec.CommandContext(t.Context(), program, args...)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// state is a disk at two instants: the tracking blocks that hold data at each,
// with the pass in which they were written, and those that changed in between.
type state struct {
	size, block  int64
	older, newer map[int64]byte
	changed      []int64
}

// randomState writes and zeroes some of the blocks that are most likely to go
// wrong: those at both ends of the disk and of tables, and some others.
func randomState(rng *rand.Rand, size, block int64, changes float64) *state {
	s := &state{size: size, block: block, older: map[int64]byte{}, newer: map[int64]byte{}}
	blocks := ceil(size, block)
	cluster := int64(1) << clusterShift(size, block)
	table := cluster / 8 * cluster / block
	blocksOf := []int64{0, 1, blocks - 1}
	for range 20 {
		b := rng.Int64N(blocks)
		edge := b / table * table
		blocksOf = append(blocksOf, b, b+1, edge-1, edge, edge+1)
	}
	slices.Sort(blocksOf)
	for _, b := range slices.Compact(blocksOf) {
		if b < 0 || b >= blocks {
			continue
		}
		if rng.IntN(3) > 0 {
			s.older[b], s.newer[b] = 1, 1
		}
		if rng.Float64() >= changes {
			continue
		}
		s.changed = append(s.changed, b)
		if delete(s.newer, b); rng.IntN(2) == 0 {
			s.newer[b] = 2
		}
	}
	return s
}

// write makes a sparse file of the blocks.
func (s *state) write(t *testing.T, path string, blocks map[int64]byte) *os.File {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if err := f.Truncate(s.size); err != nil {
		t.Fatal(err)
	}
	for b, pass := range blocks {
		p := bytes.Repeat([]byte{pass}, int(min(s.block, s.size-b*s.block)))
		binary.BigEndian.PutUint64(p, uint64(b)+1)
		if _, err := f.WriteAt(p, b*s.block); err != nil {
			t.Fatal(err)
		}
	}
	return f
}

func (s *state) run(b int64, zero bool) Run {
	return Run{b * s.block, min(s.block, s.size-b*s.block), zero}
}

// full are the runs of a full copy of the newer state.
func (s *state) full() (runs []Run) {
	for b := range s.newer {
		runs = append(runs, s.run(b, false))
	}
	slices.SortFunc(runs, func(a, b Run) int { return int(a.Off/s.block - b.Off/s.block) })
	return runs
}

// increment are those of what changed.
func (s *state) increment() (runs []Run) {
	for _, b := range s.changed {
		runs = append(runs, s.run(b, s.newer[b] == 0))
	}
	return runs
}

// save copies the file that is made of runs.
func save(t *testing.T, path string, d Disk, image io.ReaderAt, runs []Run) {
	t.Helper()
	made, _, err := d.Make(image, each(runs...), free)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if n, err := io.Copy(f, io.NewSectionReader(made, 0, made.at.end)); err != nil || n != made.at.end {
		t.Fatalf("copy %s: %d bytes, error %v, want %d", path, n, err, made.at.end)
	}
}

// TestQEMU compares full and incremental files with raw ones, by QEMU's own tools.
func TestQEMU(t *testing.T) {
	t.Logf("repeat with -seed=%d", *seed)
	const (
		k = 1 << 10
		m = 1 << 20
	)
	for i, tc := range []struct {
		name        string
		size, block int64
		changes     float64 // part of the blocks
		cluster     int64
	}{
		{"one sector", 512, 64 * k, 1, 64 * k},
		{"less than a cluster", 64*k - 512, 64 * k, .5, 64 * k},
		{"one cluster", 64 * k, 64 * k, 1, 64 * k},
		{"a cluster and a sector", 64*k + 512, 64 * k, .5, 64 * k},
		{"4K", 30*m + 1536, 4 * k, .5, 4 * k},
		{"8K", 30*m + 1536, 8 * k, .5, 8 * k},
		{"64K", 30*m + 1536, 64 * k, .5, 64 * k},
		{"nothing changed", 30 * m, 64 * k, 0, 64 * k},
		{"all changed", 30 * m, 64 * k, 1, 64 * k},
		{"512K", 30*m + 1536, 512 * k, .5, 512 * k},
		{"2M", 31*m + 1536, 2 * m, .5, 2 * m},
		{"16M", 80*m + 1536, 16 * m, .5, 2 * m},
		{"one table", 2 * m, 4 * k, .5, 4 * k},
		{"a table and a sector", 2*m + 512, 4 * k, .5, 4 * k},
		{"a table less a sector", 2*m - 512, 4 * k, .5, 4 * k},
		{"one table of 64K", 512 * m, 64 * k, .5, 64 * k},
		{"one cluster of L1 table", 512 * 2 * m, 4 * k, .5, 4 * k},
		{"more than 1 TiB", 1200*k*m + 512, 64 * k, .5, 64 * k},
		{"more than 1 TiB of 2M", 1200*k*m + 512, 2 * m, .5, 2 * m},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			s := randomState(rand.New(rand.NewPCG(*seed, uint64(i))), tc.size, tc.block, tc.changes)
			s.write(t, filepath.Join(dir, "older"), s.older)
			newer := s.write(t, filepath.Join(dir, "newer"), s.newer)
			d := Disk{Size: tc.size, Block: tc.block}

			save(t, filepath.Join(dir, "full"), d, newer, s.full())
			checkInfo(t, dir, "full", tc.size, tc.cluster)
			checkSame(t, dir, "full")

			d.Backing = "vda@7-9b2f6c8e-35a7-4a54-8e8f-3f1b5a4c7d60"
			save(t, filepath.Join(dir, "increment"), d, newer, s.increment())
			checkInfo(t, dir, "increment", tc.size, tc.cluster)
			if out, err := tryQEMU(t, dir, "qemu-img", "compare", "-f", "raw", "-F", "qcow2", "newer", "increment"); err == nil {
				t.Errorf("the increment alone can be read: %s", out)
			}
			qemu(t, dir, "qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", "older", "increment")
			checkSame(t, dir, "increment")
		})
	}
}

// checkInfo checks what QEMU takes from the header.
func checkInfo(t *testing.T, dir, name string, size, cluster int64) {
	t.Helper()
	var info struct {
		Size    int64  `json:"virtual-size"`
		Cluster int64  `json:"cluster-size"`
		Backing string `json:"backing-filename"`
		Format  string `json:"backing-filename-format"`
	}
	out := qemu(t, dir, "qemu-img", "info", "--output=json", name)
	if err := json.Unmarshal([]byte(out), &info); err != nil {
		t.Fatalf("qemu-img info printed %s: %v", out, err)
	}
	if info.Size != size || info.Cluster != cluster {
		t.Errorf("size and cluster size\n got %d, %d\nwant %d, %d", info.Size, info.Cluster, size, cluster)
	}
	if incremental := info.Backing != "" && info.Format == "raw"; incremental != (name == "increment") {
		t.Errorf("backing file of %s\n got %q, format %q", name, info.Backing, info.Format)
	}
}

// checkSame lets QEMU look for faults in a file and compare it with the newer
// state; small ones are also converted and compared without QEMU.
func checkSame(t *testing.T, dir, name string) {
	t.Helper()
	if out, want := qemu(t, dir, "qemu-img", "check", "-q", name), ""; out != want {
		t.Errorf("qemu-img check %s\n got %s\nwant nothing", name, out)
	}
	qemu(t, dir, "qemu-img", "compare", "-q", "-f", "raw", "-F", "qcow2", "newer", name)
	newer, err := os.Open(filepath.Join(dir, "newer"))
	if err != nil {
		t.Fatal(err)
	}
	defer newer.Close()
	if st, err := newer.Stat(); err != nil || st.Size() > 100<<20 {
		return
	}
	qemu(t, dir, "qemu-img", "convert", "-f", "qcow2", "-O", "raw", name, "raw")
	qemu(t, dir, "cmp", "newer", "raw")
}

// TestLargest opens files of the largest devices, which QEMU refuses if a table is
// too long: as they are when sparse, and at the size that they have when full.
func TestLargest(t *testing.T) {
	const t16 = 16<<40 - 512
	for _, tc := range []struct {
		name                 string
		size, block, cluster int64
	}{
		{"4K, the largest", 8<<40 - 64<<30, 4096, 4096},
		{"4K, more than that", 8 << 40, 4096, 8192},
		{"16 TiB of 4K", t16, 4096, 8192},
		{"16 TiB of 64K", t16, 65536, 65536},
		{"16 TiB of 16M", t16, 16 << 20, 2 << 20},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := t.TempDir()
			d := Disk{Size: tc.size, Block: tc.block}
			runs := []Run{{0, 65536, false}, {tc.size / 2 &^ 65535, 1 << 20, false}, {tc.size - 1536, 1536, false}}
			save(t, filepath.Join(dir, "sparse"), d, tags{}, runs)
			checkInfo(t, dir, "sparse", tc.size, tc.cluster)
			qemu(t, dir, "qemu-img", "check", "-q", "sparse")
			for _, off := range []int64{512, tc.size/2&^65535 + 65536, tc.size - 512} {
				command := fmt.Sprintf("read -P %d %d 512", tag(off), off)
				if out := qemu(t, dir, "qemu-io", "-r", "-f", "qcow2", "-c", command, "sparse"); bytes.Contains([]byte(out), []byte("failed")) {
					t.Errorf("%s\n%s", command, out)
				}
			}

			// The whole device takes one run, its file more than a disk has. QEMU
			// looks at the tables' lengths when it opens the first part of it.
			f, _, err := d.Make(tags{}, each(Run{0, tc.size, false}), free)
			if err != nil {
				t.Fatal(err)
			}
			full, err := os.Create(filepath.Join(dir, "full"))
			if err != nil {
				t.Fatal(err)
			}
			defer full.Close()
			if _, err := io.Copy(full, io.NewSectionReader(f, 0, f.at.refBlocks)); err != nil {
				t.Fatal(err)
			}
			checkInfo(t, dir, "full", tc.size, tc.cluster)
			p := make([]byte, 512)
			if _, err := f.ReadAt(p, f.at.end-ceil(d.Size, tc.cluster)*tc.cluster+d.Size-512); err != nil || p[0] != tag(tc.size-512) {
				t.Errorf("last sector of the full file\n got %d, %v\nwant %d", p[0], err, tag(tc.size-512))
			}
		})
	}
}

// tags is an image in which each sector is filled with its tag.
type tags struct{}

// tag returns a byte that is not 0.
func tag(off int64) byte { return byte(off/512%255 + 1) }

func (tags) ReadAt(p []byte, off int64) (int, error) {
	for i := range p {
		p[i] = tag(off + int64(i))
	}
	return len(p), nil
}

// What is measured: the rows of the table.

package main

import (
	"fmt"
	"os"
	"path/filepath"
)

const (
	kiB = 1 << 10
	miB = 1 << 20
	giB = 1 << 30
	tiB = 1 << 40
)

// row is one kind of work, measured on each of its subjects. Each subject is
// compared to the first.
type row struct {
	name, group, work string
	unit              unit
	subjects          []subject
	aim               string // of the ratios, or of the first value
}

type subject struct {
	name    string
	measure func(*bench) (float64, error)
}

var (
	read4k1   = load{rw: "randread", block: 4 * kiB, depth: 1}
	read4k32  = load{rw: "randread", block: 4 * kiB, depth: 32}
	write4k1  = load{rw: "randwrite", block: 4 * kiB, depth: 1}
	write4k32 = load{rw: "randwrite", block: 4 * kiB, depth: 32}
	read1m4   = load{rw: "read", block: miB, depth: 4}
	write1m4  = load{rw: "write", block: miB, depth: 4}

	// No block twice: under a snapshot each is a first write.
	first4k1  = load{rw: "randwrite", block: 4 * kiB, depth: 1, total: 64 * miB}
	first4k32 = load{rw: "randwrite", block: 4 * kiB, depth: 32, total: 800 * miB}
	first1m4  = load{rw: "write", block: miB, depth: 4, total: 2 * giB}

	// What a minute of writes costs, with all that is done once a minute.
	long4k32 = load{rw: "randwrite", block: 4 * kiB, depth: 32, long: true}
	long1m4  = load{rw: "write", block: miB, depth: 4, long: true}

	// As many as 1 TiB has regions of 64 MiB, and one write to each of them.
	anywhere4k32 = load{rw: "randwrite", block: 4 * kiB, depth: 32, size: tiB, total: 16384 * 4 * kiB, anywhere: true}
	eachRegion   = load{rw: fmt.Sprint("write:", 64*miB-4*kiB), block: 4 * kiB, depth: 32, size: tiB, total: 16384 * 4 * kiB}

	everything = load{rw: "write", block: miB, depth: 4, total: tiB}
	half       = load{rw: "randwrite", block: 64 * kiB, depth: 8, half: true}
)

const (
	noSnapshot = "No snapshot open"
	snapshot   = "One snapshot open, every write a first write"
	own        = "blksnap against itself"
	snapshots  = "Taking a snapshot under write load: how long writes were held up"
	memory     = "Memory"
	tracking   = "Change tracking"
	images     = "Reading an image"
)

var rows = []row{
	plain("read4k1", "4 KiB random read, 1 in flight", requestRate, read4k1, "nbdkit 1.4"),
	plain("read4k32", "4 KiB random read, 32 in flight", requestRate, read4k32, "nbdkit 1.8"),
	plain("write4k1", "4 KiB random write, 1 in flight", requestRate, write4k1, "nbdkit 1.4"),
	plain("write4k32", "4 KiB random write, 32 in flight", requestRate, write4k32, "nbdkit 1.15"),
	plain("read1m4", "1 MiB sequential read, 4 in flight", byteRate, read1m4, "nbdkit 1.15"),
	plain("write1m4", "1 MiB sequential write, 4 in flight", byteRate, write1m4, "nbdkit 1.0"),
	{"cold4k32", noSnapshot, "4 KiB random read, 32 in flight, origin not in page cache", requestRate,
		servers(func(s *server) (float64, error) {
			if err := cold(s.b.origin); err != nil {
				return 0, err
			}
			return read4k32.put(s)
		}), "nbdkit 1.1"},
	{"nbdcopy", noSnapshot, "nbdcopy of the whole export, 4 connections", byteRate,
		servers(func(s *server) (float64, error) { return s.nbdcopy(s.live) }), "nbdkit 1.05"},

	first("first4k32", "4 KiB random write, 32 in flight", requestRate, first4k32, "QEMU 3.5, no snapshot 0.6"),
	first("first4k1", "4 KiB random write, 1 in flight", requestRate, first4k1, "QEMU 2.5, no snapshot 0.7"),
	first("first1m4", "1 MiB sequential write, 4 in flight", byteRate, first1m4, "QEMU 2.5, no snapshot 0.55"),
	{"space", snapshot, "store space for each byte of 800 MiB in 4 KiB random writes", factor, []subject{
		{"blksnap", on(snapshotted(1), spaceFactor("store"))},
		{"QEMU copy-before-write", on((*bench).qemuSnapshot, spaceFactor("target"))},
	}, "at most 1.05"},

	{"second4k32", own, "a second 4 KiB random write to each block, 32 in flight: snapshot open, no snapshot", requestRate,
		inTurns("with", snapshotted(1), "without", (*bench).blksnapOn, everything, write4k32), "0.97"},
	{"first16", own, "first 4 KiB random writes, 32 in flight: 16 snapshots open, one open", requestRate, []subject{
		{"with", on(snapshotted(16), first4k32.put)},
		{"without", on(snapshotted(1), first4k32.put)},
	}, "0.97"},
	{"reads", own, "4 KiB random reads, 32 in flight, during 5,000 writes a second: first writes, plain writes", requestRate, []subject{
		{"with", on(snapshotted(1), readsDuringWrites)},
		{"without", on((*bench).blksnapOn, readsDuringWrites)},
	}, "0.9"},

	{"pause50", snapshots, "median of 50", micros, pauses(0.5), "under 1,000 us, the same at each size"},
	{"pause99", snapshots, "99th percentile of 50", micros, pauses(0.99), "-"},
	{"memory64", memory, "64 connections, 64 reads of 1 MiB in flight on each: largest resident size", byteCount,
		servers(func(s *server) (float64, error) {
			l := read1m4
			l.depth, l.jobs = 64, 64
			if _, err := l.put(s); err != nil {
				return 0, err
			}
			return s.status("VmHWM")
		}), "under 256 MiB"},
	{"memory16t", memory, "origin of just under 16 TiB, 1 GiB overwritten in one piece: anonymous memory", byteCount, []subject{
		{"blksnap", anonymous(load{rw: "write", block: miB, depth: 4, total: giB})},
	}, "under 64 MiB"},
	{"memory16tr", memory, "the same, 262,144 random blocks of 4 KiB overwritten", byteCount, []subject{
		{"blksnap", anonymous(load{rw: "randwrite", block: 4 * kiB, depth: 32, total: giB, anywhere: true})},
	}, "under 256 MiB"},

	{"mark", tracking, "marking a 4 KiB write at random, that was marked before", nanos,
		marks("alone", "ns/op"), "under 50 ns"},
	{"marktogether", tracking, "the same, while another writer marks, too", nanos,
		marks("together", "ns/mark"), "under 50 ns"},
	{"freeze", tracking, "freezing a full map of just under 16 TiB, the slowest of 30, after marks in so much of it", micros,
		[]subject{
			{"none", goBench("BenchmarkFreeze16TiB/none", "ns/slowest", "30x", 1e-3)},
			{"100 leaves", goBench("BenchmarkFreeze16TiB/some", "ns/slowest", "30x", 1e-3)},
			{"all", goBench("BenchmarkFreeze16TiB/all", "ns/slowest", "30x", 1e-3)},
		}, "under 100 us"},
	{"since", tracking, "since/NUM of just under 16 TiB, of which 1 % changed in 1,000 runs, to the last byte", millis,
		[]subject{
			{"file in the tree", onSparse(nearly16TiB, increment)},
			{"map alone", goBench("BenchmarkSince16TiB/runs-in-a-full-map", "ns/op", "20x", 1e-6)},
		}, "under 50 ms"},
	{"restart", tracking, "after SIGKILL, that device, 100,000 chunks preserved: from the start to the first reply", millis,
		[]subject{{"blksnap", onSparse(nearly16TiB, restart)}}, "under 1,000 ms"},
	{"record4k32", tracking, "4 KiB random write, 32 in flight, over a checkpoint: with and without a record for loss of power", requestRate,
		withAndWithoutState(long4k32), "0.98"},
	{"record1m4", tracking, "1 MiB sequential write, 4 in flight, the same", byteRate,
		withAndWithoutState(long1m4), "0.98"},
	{"record1t", tracking, "16,384 random 4 KiB writes over 1 TiB just after a checkpoint; after each region was recorded", requestRate,
		[]subject{
			{"unrecorded", recorded(nil)},
			{"recorded", recorded(&eachRegion)},
		}, "-"},

	image("untouched", "dd bs=1M of the image file, origin untouched", nil, "nbdfuse 5, QEMU 5"),
	image("half", "dd bs=1M, half of it overwritten, 64 KiB at random", &half, "nbdfuse 4, QEMU 4"),
	image("all", "dd bs=1M, all of it overwritten", &everything, "nbdfuse 4, QEMU 4"),
	{"cp", images, "cp of the image file to tmpfs; of the origin itself", byteRate, []subject{
		{"image", on(snapshotted(1), func(s *server) (float64, error) { return s.cp(s.imageFile()) })},
		{"origin", on(snapshotted(1), func(s *server) (float64, error) { return s.cp(s.b.origin) })},
	}, "0.65"},
	{"nbdcopyimage", images, "nbdcopy of the image, 4 connections", byteRate, []subject{
		{"blksnap", on(snapshotted(1), func(s *server) (float64, error) { return s.nbdcopy("vda@s0") })},
		{"QEMU snapshot-access", on((*bench).qemuSnapshot, func(s *server) (float64, error) { return s.nbdcopy("image") })},
	}, "1.1"},
}

// slow are rows that take minutes: they are measured twice at most.
var slow = map[string]bool{"record4k32": true, "record1m4": true}

// servers measures the same on blksnap and on the two peers without snapshots.
func servers(do func(*server) (float64, error)) []subject {
	return []subject{
		{"blksnap", on((*bench).blksnapOn, do)},
		{"nbdkit file", on((*bench).nbdkit, do)},
		{"qemu-nbd", on((*bench).qemuNbd, do)},
	}
}

func plain(name, work string, u unit, l load, aim string) row {
	return row{name, noSnapshot, work, u, servers(l.put), aim}
}

func first(name, work string, u unit, l load, aim string) row {
	return row{name, snapshot, work, u, []subject{
		{"blksnap", on(snapshotted(1), l.put)},
		{"QEMU copy-before-write", on((*bench).qemuSnapshot, l.put)},
		{"blksnap, no snapshot", on((*bench).blksnapOn, l.put)},
	}, aim}
}

// image reads the old content as a file after change, which may be nil, was
// made to the live device.
func image(name, work string, change *load, aim string) row {
	after := func(file func(*server) (string, error)) func(*server) (float64, error) {
		return func(s *server) (float64, error) {
			if change != nil {
				if _, err := change.put(s); err != nil {
					return 0, err
				}
			}
			path, err := file(s)
			if err != nil {
				return 0, err
			}
			return s.b.throughput(s.b.size, "dd", "if="+path, "of=/dev/null", "bs=1M", "status=none")
		}
	}
	return row{"image" + name, images, work, byteRate, []subject{
		{"blksnap", on(snapshotted(1), after(func(s *server) (string, error) { return s.imageFile(), nil }))},
		{"nbdfuse over nbdkit", on((*bench).nbdkit, after((*server).nbdfuse))},
		{"QEMU FUSE export", on((*bench).qemuSnapshot, after(func(s *server) (string, error) { return s.dir + "/image", nil }))},
	}, aim}
}

func spaceFactor(file string) func(*server) (float64, error) {
	return func(s *server) (float64, error) {
		path := filepath.Join(s.dir, file)
		before, err := onDisk(path)
		if err != nil {
			return 0, err
		}
		if _, err := first4k32.put(s); err != nil {
			return 0, err
		}
		after, err := onDisk(path)
		return (after - before) / float64(min(first4k32.total, s.b.size)), err
	}
}

func (s *server) imageFile() string { return s.dir + "/tree/snapshots/s0/vda.img" }

func (s *server) nbdcopy(export string) (float64, error) {
	return s.b.throughput(s.b.size, "nbdcopy", "--connections=4", s.uri(export), "null:")
}

func (s *server) cp(file string) (float64, error) {
	to := filepath.Join(s.b.sparse, fmt.Sprint("blksnap-bench-", os.Getpid()))
	defer os.Remove(to)
	return s.b.throughput(s.b.size, "cp", "--reflink=never", file, to)
}

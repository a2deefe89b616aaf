// Package qcow2 shows a disk image as a file in QEMU's format qcow2 that is made
// as it is read and never stored.
//
// # Words
//
//	cluster  the unit of the format, a power of two from 4 KiB to 2 MiB; both
//	         the image and the file are counted in them
//	kind     what a cluster of the image is in the file: data, zero (reads as
//	         zeroes, takes no space) or absent (as in the backing file; zeroes
//	         where there is none)
//	table    an L2 table: one cluster of the file, which says the kind and the
//	         place of as many neighbouring clusters as it has entries
//	run      bytes that are to be in the file, as data or as zeroes
//	span     neighbouring clusters of one kind
//	stretch  neighbouring tables in which all clusters are of one kind, or one
//	         table with a bitmap
//
// # How the file is made
//
// All tables come before all data, and both are in the image's order:
//
//	header | L1 table | refcount table | refcount blocks | L2 tables | data
//
// So the place of a table or of a data cluster in the file is known from how many
// are before it in the image, and the other way round. What is held in memory is
// the kinds of all clusters, and for each stretch how many tables and data
// clusters are before it: header, tables and refcounts are computed for whoever
// reads them, and data is read from the image.
//
// n runs make at most 3n stretches. Only a table of several kinds has a bitmap,
// with a bit for each of its clusters, or two where both data and zero are in it.
// So a file costs no more than a bitmap of its image, and few runs cost little.
package qcow2

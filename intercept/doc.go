// Package intercept is the NBD shim: a server that stands in front of origins
// and images and hands every request of every client to a Device.
//
// # Words
//
//	export      what a client opens by its name; served from one Device
//	handshake   the first phase of a connection: options until one is chosen
//	session     the second, the transmission phase: requests and replies
//	request     a header, for WRITE also a payload; known by its cookie
//	style       how replies look: simple, structured or extended
//	piece       a part of a large request, small enough to hold in memory
//	reader      the one goroutine that reads a connection's socket; another takes
//	            its place where it hangs in a Device (session.goOn)
//	worker      a goroutine that serves the requests that may wait
//
// # The way of a request
//
//	socket -> input -> header -> check -> TryRead, TryWrite -> batch -> socket
//	                                   \-> pool -> Device   -> sender -/
//
// The reader parses what the socket gave it in one piece, serves at once what
// the Device can serve without waiting, and collects the replies in a batch
// that is written when no whole next header is left in the input. What may
// wait goes to the connection's own workers, so that a slow request holds up
// no other connection. Whoever has a reply while nobody writes to the socket
// becomes the writer, for all who have one meanwhile.
//
// # Invariants
//
//  1. Every request passes check before a Device sees it; a failing request is
//     answered with its error, and only a broken protocol ends a connection.
//  2. Memory is taken after the length that asks for it was checked, and what
//     all connections hold together stays within Options.MemoryBudget. A part
//     of it is each connection's own, enough to go on with: no peer that stops
//     reading and no Device that hangs can stop another connection.
//  3. A WRITE payload is always consumed, also if the request is refused, so
//     that the next header is found where it is.
//  4. A Flush is called after the replies to the writes that it must cover
//     were made: it is dispatched when its header is read, and a client that
//     expects a write to be covered has read that write's reply.
//  5. Export.Release is called once, when no request of the connection is in
//     the Device and none can come: the connection has ended or the export is
//     gone.
//
// The specification is doc/proto.md of the NetworkBlockDevice project, for
// extended headers its branch extension-ext-header. Section names in comments
// are those of that document.
package intercept
